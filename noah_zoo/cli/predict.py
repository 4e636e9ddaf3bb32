"""Classify images.

    noah-zoo predict
    noah-zoo predict photo.jpg folder/ --model resnet50.a1_in1k --top-k 5
    noah-zoo predict folder/ --output folder.csv

Without arguments: the sample images of the package, with the weights of the package. No network. A file of --output is
written image by image; the same command, after Ctrl-C say, goes on with it.
"""
import argparse
import json
import sys
from contextlib import nullcontext

from . import Parser, file_path, model_name, path, readable_errors

ERRORS_SHOWN = 10


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive number')
    return int(text)


def parse_args(argv, prog):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument(
        'paths', nargs='*', type=path, metavar='PATH',
        help='images and folders of images (the sample images)')
    parser.add_argument(
        '--model', type=model_name, metavar='NAME',
        help="timm name, 'local-dir:DIR' or 'hf-hub:USER/MODEL' (mobilenetv2_035_noah.fashion_mnist)")
    parser.add_argument('--top-k', type=positive, default=3, metavar='K', help='classes per image (3)')
    parser.add_argument('--device', default='cpu', help="torch device, 'cuda' say (cpu)")
    parser.add_argument('-b', '--batch-size', type=positive, default=64, metavar='N', help='images at a time (64)')
    parser.add_argument(
        '-j', '--workers', type=int, metavar='N',
        help='processes that read images (0 below 1,000 images, else by the processors)')
    written = parser.add_mutually_exclusive_group()
    written.add_argument('--json', action='store_true', help='print one JSON list instead of text')
    written.add_argument(
        '--output', type=file_path, metavar='FILE',
        help='write FILE.csv or FILE.jsonl instead; an unfinished file is continued')
    return parser, parser.parse_args(argv)


def run(parser, args):
    output, shown, failed = None, [], 0

    def kept() -> str:
        if not output:
            return ''
        return f'; {args.output} has {output.done:,} of {len(images):,} images, and the same command goes on with it'

    with readable_errors(parser, kept=kept):
        from huggingface_hub.utils import tqdm

        from noah_zoo.inference.output import PredictionFile, check_output
        from noah_zoo.inference.predict import DEFAULT_MODEL, SAMPLES, default_workers, find_images, load_model, predict

        name = args.model or DEFAULT_MODEL
        listed = [path(line.rstrip('\r\n')) for line in sys.stdin if line.strip()] if '-' in args.paths else []
        paths = [name for name in args.paths if name != '-'] + listed
        if args.paths and not paths:
            raise ValueError('no images: the list on standard input is empty')
        images = find_images(paths or [str(SAMPLES)])
        if args.output:
            check_output(args.output)
        model = load_model(name, args.device)
        if args.output:
            output = PredictionFile(args.output, name, min(args.top_k, model.num_classes), images)
        left = images[output.done:] if output else images
        workers = default_workers(len(left), next(model.parameters()).device) if args.workers is None else args.workers
        results = predict(model, left, args.top_k, args.batch_size, workers)
        bar = tqdm(total=len(images), initial=len(images) - len(left), unit='img', disable=None, leave=False)
        with output or nullcontext(), bar:
            for result in results:
                if output:
                    output.add(result)
                elif args.json:
                    shown.append(result)
                if 'error' in result:
                    failed += 1
                    if failed <= ERRORS_SHOWN:
                        tqdm.write(result['error'], file=sys.stderr)
                elif not output and not args.json:
                    guesses = (f'\n  {guess["probability"]:7.2%}  {guess["label"]}' for guess in result['predictions'])
                    tqdm.write(result['path'] + ''.join(guesses), file=sys.stdout)
                bar.update()
        if failed > ERRORS_SHOWN:
            print(f'{failed:,} images cannot be classified; the first {ERRORS_SHOWN} are above', file=sys.stderr)
        if args.json:
            print(json.dumps(shown, indent=2, allow_nan=False))
        if output:
            failed = output.failed
            unread = f', {failed:,} of which cannot be classified' if failed else ''
            before = f'; {len(images) - len(left):,} were there already' if len(left) < len(images) else ''
            print(f'{args.output}: {output.done:,} images{unread}{before}')
    return 1 if failed else 0
