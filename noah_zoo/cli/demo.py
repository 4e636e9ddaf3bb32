"""A page in the browser: pick an image, see what a NOAH model says and where it looked.

    python scripts/demo.py
    python scripts/demo.py --model hf-hub:you/photos --samples photos/ --port 8000

It works offline with the shipped model. Needs pip install 'noah-zoo[demo]'.
"""
import argparse
import os
import sys
import time


def main(prog: str = 'demo.py') -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--model', nargs='+', default=[], metavar='NAME',
        help="timm names, 'local-dir:DIR', 'hf-hub:USER/MODEL' to choose from (the shipped model and the paper's)")
    parser.add_argument(
        '--samples', nargs='+', default=[], metavar='PATH',
        help='images and folders of images to offer, the first 50, before those of the package')
    parser.add_argument('--device', default='cpu', help="torch device, 'cuda' say (cpu)")
    parser.add_argument('--host', default='127.0.0.1', help="address to listen on, '0.0.0.0' for all (127.0.0.1)")
    parser.add_argument('--port', type=int, default=7860, help='port to listen on (7860)')
    args = parser.parse_args()

    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    from noah_zoo.cli import plain_errors

    with plain_errors(parser):
        try:
            import noah_zoo  # noqa: F401  registers the models
            from noah_zoo.inference.demo import LAUNCH, create_page
        except ImportError as error:
            raise ImportError(f"{error}; pip install 'noah-zoo[demo]'") from None
        page = create_page(args.model, args.device, args.samples)
        try:
            page.launch(
                server_name=args.host, server_port=args.port, prevent_thread_lock=True, quiet=True, **LAUNCH)
        except (OSError, OverflowError):
            raise OSError(f'cannot listen on {args.host}:{args.port}, which is in use or is not of this machine; '
                          f'give another --port or --host') from None
    print(f'http://{args.host}:{args.port}  (Ctrl-C ends it)', flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == '__main__':
    sys.exit(main())
