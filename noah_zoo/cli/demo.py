"""Serve a web page that classifies an image and shows where a NOAH model looked.

    noah-zoo demo
    noah-zoo demo --model hf-hub:you/photos --samples photos/ --port 8000

It works offline with the shipped model. Needs pip install 'noah-zoo[demo]'.
"""
import os
import time

from . import Parser, model_name, path, readable_errors


def parse_args(argv, prog):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument(
        '--model', nargs='+', default=[], type=model_name, metavar='NAME',
        help="timm names, 'local-dir:DIR', 'hf-hub:USER/MODEL' to choose from (the shipped model and the paper's)")
    parser.add_argument(
        '--samples', nargs='+', type=path, default=[], metavar='PATH',
        help='images and folders of images to offer, the first 50, before those of the package')
    parser.add_argument('--device', default='cpu', help="torch device, 'cuda' say (cpu)")
    parser.add_argument('--host', default='127.0.0.1', help="address to listen on, '0.0.0.0' for all (127.0.0.1)")
    parser.add_argument('--port', type=int, default=7860, help='port to listen on (7860)')
    return parser, parser.parse_args(argv)


def run(parser, args):
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    with readable_errors(parser):
        try:
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
