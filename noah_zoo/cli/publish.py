"""Publish models on the Hugging Face Hub.

    noah-zoo publish resnet50_noah --from official                     # the authors' file, from Google Drive
    noah-zoo publish resnet50_noah resnet50 --from weights --dry-run   # converted folders or released files
    noah-zoo publish --all --from official --namespace my-mirror       # all 50; skips what is done
    noah-zoo publish --from runs/pets --repo-id you/your-model         # your own training run
    noah-zoo publish --from runs/pets --repo-id you/pets-head --head-only   # of a frozen one, what it trained

Log in first: `hf auth login`, or set HF_TOKEN. Weights are checked, uploaded, downloaded again and
compared before the revision is tagged. Run an interrupted command again to finish it.
"""
import logging

from . import Parser, path, readable_errors


def parse_args(argv, prog):
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add('names', nargs='*', metavar='NAME', help='timm names of NOAH models or of their vanilla twins')
    add(
        '--from', dest='source', required=True, type=path, metavar='DIR|official',
        help="folder of the weights, or 'official'")
    add('--all', action='store_true', help='all 50 models of the release')
    add('--namespace', metavar='N', help='user or organisation (noah-zoo)')
    add('--repo-id', metavar='USER/MODEL', help='publish the training run in DIR under this name')
    add('--head-only', action='store_true', help='of a run with a frozen backbone from the Hub: send the head alone')
    add('--private', action='store_true', help='make the repository private')
    add('--dry-run', action='store_true',
        help='do everything but ask or change the Hub; --head-only asks it for the backbone')
    args = parser.parse_args(argv)
    if bool(args.names) + args.all + bool(args.repo_id) != 1:
        parser.error('name models, or give --all, or give --repo-id for a training run')
    if args.repo_id and args.namespace:
        parser.error('--repo-id has the namespace already')
    if args.head_only and not args.repo_id:
        parser.error('--head-only is for a training run; give its --repo-id')
    return parser, args


def run(parser, args):
    with readable_errors(parser, RuntimeError, kept=lambda: '; run the same command again, it goes on where it was'):
        from huggingface_hub.utils import tqdm

        from noah_zoo.catalog import NAMESPACE, released
        from noah_zoo.publish.publish import publish_model, publish_run

        logging.basicConfig(level=logging.WARNING, format='%(message)s')
        logging.getLogger('noah_zoo.publish').setLevel(logging.INFO)
        failed = 0
        if args.repo_id:
            publish_run(args.source, args.repo_id, args.private, args.dry_run, args.head_only)
            print(f"timm.create_model('hf-hub:{args.repo_id}', pretrained=True)")
            return
        names = args.names or released()
        for name in tqdm(names, desc='models', disable=len(names) == 1):
            try:
                publish_model(name, args.source, args.namespace or NAMESPACE, args.private, args.dry_run)
            except (OSError, ValueError, RuntimeError) as error:
                logging.error('%s: error: %s', parser.prog, error)
                failed += 1
        if failed:
            summary = f'{parser.prog}: {failed} of {len(names)} failed; run the same command again for those\n'
            parser.exit(2, summary if len(names) > 1 else None)
