"""Classify images.

    python scripts/predict.py
    python scripts/predict.py photo.jpg folder/ --model resnet50.a1_in1k --top-k 5

Without arguments: the sample images of the package, with the weights of the package. No network.
"""
import argparse
import json
import sys


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive number')
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog='predict.py', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='*', metavar='PATH', help='images and folders of images (the sample images)')
    parser.add_argument(
        '--model', metavar='NAME',
        help="timm name, 'local-dir:DIR' or 'hf-hub:USER/MODEL' (mobilenetv2_035_noah.fashion_mnist)")
    parser.add_argument('--top-k', type=positive, default=3, metavar='K', help='classes per image (3)')
    parser.add_argument('--device', default='cpu', help="torch device, 'cuda' say (cpu)")
    parser.add_argument('--json', action='store_true', help='print one JSON list instead of text')
    args = parser.parse_args()

    import noah_zoo  # noqa: F401  registers the models
    from noah_zoo.inference.predict import DEFAULT_MODEL, SAMPLES, find_images, load_model, predict

    try:
        images = find_images(args.paths or [str(SAMPLES)])
        results = predict(load_model(args.model or DEFAULT_MODEL, args.device), images, args.top_k)
    except (OSError, ValueError) as error:
        parser.exit(2, f'predict.py: error: {error}\n')
    failed = 0
    shown = []
    for result in results:
        failed += 'error' in result
        if 'error' in result:
            print(result['error'], file=sys.stderr)
        if args.json:
            shown.append(result)
        elif 'error' not in result:
            print(result['path'])
            for guess in result['predictions']:
                print(f'  {guess["probability"]:7.2%}  {guess["label"]}')
    if args.json:
        print(json.dumps(shown, indent=2))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
