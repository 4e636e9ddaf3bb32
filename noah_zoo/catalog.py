"""The one table. Everything that is said of a model anywhere in the project is said here first."""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union


@dataclass(frozen=True)
class PaperResults:
    """What the paper prints of a model on ImageNet-1k.

    Attributes:
        params_m: Parameters in millions (Tables I to III).
        top1: Validation top-1 accuracy in percent (Tables I to III).
        top5: Validation top-5 accuracy in percent (Tables I to III).
        gpu_fps: Images per second on the paper's GPU at batch 200 (Table XVII).
        cpu_fps: Images per second on one CPU core at batch 1 (Table XVII).
    """
    params_m: float
    top1: float
    top5: float
    gpu_fps: float
    cpu_fps: float


@dataclass(frozen=True)
class Pair:
    """A NOAH model and its vanilla twin.

    Attributes:
        name: The timm name.
        vanilla: The timm name of the twin: same backbone, the usual head.
        family: A name of `FAMILIES`.
        num_groups: N, number of POCA blocks.
        key_ratio: Share of the channels that go to the key.
        drop_rate: Dropout probability on the value map in training.
        params: Parameters of the released code with 1,000 classes.
        paper: The paper's figures.
        drive_id: Google Drive id of the authors' checkpoint.
        vanilla_params: As `params`, of the twin.
        vanilla_paper: As `paper`, of the twin.
        vanilla_drive_id: As `drive_id`, of the twin.
    """
    name: str
    vanilla: str
    family: str
    num_groups: int
    key_ratio: float
    drop_rate: float
    params: int
    paper: PaperResults
    drive_id: str
    vanilla_params: int
    vanilla_paper: PaperResults
    vanilla_drive_id: str


@dataclass(frozen=True)
class Family:
    """What the models of a backbone have in common.

    Attributes:
        label: What the family is called in prose.
        table: The paper's table with their parameters and accuracy.
        recipe: The paper's training settings, a name of `noah_zoo.recipes.RECIPES`.
        released_names: Patterns in timm's names of parameters, and what the release has in their place; in this order.
    """
    label: str
    table: str
    recipe: str
    released_names: Tuple[Tuple[str, Union[str, Callable]], ...]


_CNN_HEAD = (
    (r'^(fc|classifier)\.key\.', 'head.query.'),
    (r'^(fc|classifier)\.value\.', 'head.value.'),
    (r'^(fc|classifier)\.', 'head.2.'),
)
_TOKEN_HEAD = ((r'^head\.key\.', 'head.query.'),)
FAMILIES: Dict[str, Family] = {
    'resnet': Family('ResNet', 'I', 'resnet', _CNN_HEAD),
    'mobilenet': Family('MobileNetV2', 'I', 'mobilenet', _CNN_HEAD),
    'shufflenet': Family('ShuffleNetV2', 'I', 'shufflenet', _CNN_HEAD),
    'deit': Family('DeiT', 'II', 'deit', ((r'^representation\.', 'pre_logits.'), *_TOKEN_HEAD)),
    'pvt': Family('Pyramid Vision Transformer', 'II', 'pvt', (
        (r'^stages\.(\d)\.(patch_embed|pos_embed)', lambda match: f'{match[2]}{int(match[1]) + 1}'),
        (r'^stages\.(\d)\.blocks', lambda match: f'block{int(match[1]) + 1}'),
        (r'^stages\.3\.cls_token', 'cls_token'),
        *_TOKEN_HEAD)),
    'mixer': Family('MLP-Mixer', 'III', 'mixer', _TOKEN_HEAD),
    'gmlp': Family('gMLP', 'III', 'gmlp', _TOKEN_HEAD),
}


CATALOG: Dict[str, Pair] = {model.name: model for model in (
    Pair(
        'resnet18_noah', 'resnet18', 'resnet', 4, 1 / 2, 0.1,
        11696512, PaperResults(11.7, 71.81, 90.18, 2117.88, 12.2), '1G1FWERwP-bRp7-ykqSk0yfSOKSnkXNPm',
        11689512, PaperResults(11.69, 70.25, 89.38, 2394.0, 12.98), '1K5i2HM4o1wQPyv64GXAkEKSQAOEiOKjJ'),
    Pair(
        'resnet50_noah', 'resnet50', 'resnet', 4, 1 / 8, 0.1,
        25564032, PaperResults(25.56, 77.25, 93.65, 641.36, 5.25), '1DmPnel6Rai3KLIREwx2eAkyj-YM1gvj2',
        25557032, PaperResults(25.56, 76.23, 93.01, 674.44, 5.46), '1c1S174i96QAkeWeX422ydQFFCl0jb92c'),
    Pair(
        'resnet101_noah', 'resnet101', 'resnet', 4, 1 / 8, 0.1,
        44556160, PaperResults(44.56, 78.22, 94.13, 388.38, 3.08), '1UlL7uOhQOQiqSGg5m1jHBaI7PiN49VTU',
        44549160, PaperResults(44.55, 77.41, 93.67, 398.98, 3.2), '1Ix4YfZU8Cuh6ZJ0NmdtDWI04Hcg_MR7l'),
    Pair(
        'resnet152_noah', 'resnet152', 'resnet', 4, 1 / 8, 0.1,
        60199808, PaperResults(60.2, 78.57, 94.36, 269.7, 2.09), '15-If0bsZOE8wogItrkbopIh02amuhVio',
        60192808, PaperResults(60.19, 78.16, 94.06, 275.08, 2.15), '1y1AUkHRiR-bjiJ-SMA_YIaaiaosvAvCe'),
    Pair(
        'mobilenetv2_100_noah', 'mobilenetv2_100', 'mobilenet', 8, 1 / 4, 0.2,
        3519872, PaperResults(3.52, 73.35, 91.13, 1361.38, 16.06), '1npeyGbDtM978vU14aXy1lbrVD7gOrwyp',
        3504872, PaperResults(3.5, 72.02, 90.43, 1522.62, 17.38), '1SyV8gB_1wYKa_LhB8yB7eH8vWVVwEzfG'),
    Pair(
        'mobilenetv2_075_noah', 'mobilenetv2_075', 'mobilenet', 8, 1 / 4, 0.2,
        2651424, PaperResults(2.65, 71.44, 89.87, 1565.28, 17.32), '1xE-f7kEAo9F2Xvqt8N0f4A736mdneHsE',
        2636424, PaperResults(2.64, 69.65, 88.99, 1762.84, 20.31), '1QsYwEtpeVDOlhqDNsVZBsynVKjZBmcW7'),
    Pair(
        'mobilenetv2_050_noah', 'mobilenetv2_050', 'mobilenet', 8, 1 / 4, 0.2,
        1983680, PaperResults(1.98, 67.44, 87.11, 2361.18, 22.88), '1MTJH8_gsS4p4ONRbkl0hOpQXwUWYwlW8',
        1968680, PaperResults(1.97, 64.3, 85.21, 2829.84, 28.43), '1Cet7BFh5sgAGXrFJ_0LkTJSVLq0aD__0'),
    Pair(
        'mobilenetv2_035_noah', 'mobilenetv2_035', 'mobilenet', 8, 1 / 4, 0.2,
        1692128, PaperResults(1.69, 63.4, 83.91, 2850.02, 28.6), '1MJmROWDA_xWv6M2-swl16WMa4jYdRxMJ',
        1677128, PaperResults(1.68, 59.62, 81.79, 3576.58, 36.09), '1j9ONdi0riX7UM-UqiZLC5sRdtvd6e3it'),
    Pair(
        'shufflenetv2_100_noah', 'shufflenetv2_100', 'shufflenet', 8, 1 / 4, 0.0,
        2293604, PaperResults(2.29, 70.72, 89.38, 3312.82, 29.21), '1F1iSWcaqDvLy32pCBnUAHsXvNufudawL',
        2278604, PaperResults(2.28, 69.43, 88.81, 4241.94, 34.36), '1Sa5jkeotyYkL1QXRcxhSLwaJ0Oq8i1O2'),
    Pair(
        'deit_tiny_patch16_224_noah', 'deit_tiny_patch16_224', 'deit', 4, 1 / 2, 0.1,
        5724032, PaperResults(5.72, 74.29, 92.27, 1039.72, 14.55), '1RqhNCFkWQNCuh7pq020qsJm0MD9yUuH3',
        5717416, PaperResults(5.72, 72.16, 91.3, 1246.51, 15.76), '1Kl_rEyGNkaTIjJwGtTfjNcCr5HKk_dFv'),
    Pair(
        'deit_tiny_075_patch16_224_noah', 'deit_tiny_075_patch16_224', 'deit', 4, 1 / 2, 0.1,
        3375536, PaperResults(3.3, 66.64, 87.79, 1271.78, 20.74), '1DyoceZC9vmjxU_mMCFOkGmwqjIHSKKEf',
        3368824, PaperResults(3.29, 62.55, 85.32, 1606.39, 23.52), '1tj4AAuNJfImYGRL-OjnC-uQ3lucolgUK'),
    Pair(
        'deit_tiny_050_patch16_224_noah', 'deit_tiny_050_patch16_224', 'deit', 4, 1 / 2, 0.1,
        1653536, PaperResults(1.54, 56.66, 80.41, 1644.79, 29.3), '1_4VaeiIbMEmKWmyPuEfBhYIB8UwIRaXp',
        1646728, PaperResults(1.53, 51.36, 76.79, 2169.99, 34.51), '18M8rx369PkaA_RtXtjRPObuODJ1btxYw'),
    Pair(
        'deit_small_patch16_224_noah', 'deit_small_patch16_224', 'deit', 4, 1 / 2, 0.1,
        22056896, PaperResults(22.06, 80.56, 95.39, 456.79, 5.48), '1SatPUgds1vtkfv1QdCks_27hwRMIlgni',
        22050664, PaperResults(22.06, 79.78, 94.99, 525.86, 5.71), '1NUW76MMR2N3k3r4JS_fvRACWdsd77SH_'),
    Pair(
        'deit_base_patch16_224_noah', 'deit_base_patch16_224', 'deit', 4, 1 / 2, 0.1,
        86573120, PaperResults(86.86, 82.22, 95.75, 164.16, 1.59), '1J-E1lhaNQlZchywQmzJm9pkKrJLvdGvf',
        86567656, PaperResults(86.86, 81.85, 95.59, 172.59, 1.64), '1w2FX00uDSQG_W0fRh8CV5c9APC7D9tCy'),
    Pair(
        'pvt_tiny_noah', 'pvt_tiny', 'pvt', 4, 1 / 2, 0.1,
        13235264, PaperResults(13.24, 76.51, 93.25, 603.67, 8.82), '1vGhoJilp5bloX6mQlgymE9buftqM-A3_',
        13229288, PaperResults(13.23, 75.1, 92.41, 619.85, 9.13), '1q4wivIKXRn3nC8VexefNkRoXulB_B15q'),
    Pair(
        'pvt_tiny_075_noah', 'pvt_tiny_075', 'pvt', 4, 1 / 2, 0.1,
        7624448, PaperResults(7.62, 74.22, 91.82, 766.34, 13.2), '1G4qdAANZgULbk3XP2KLRjqw3RgBqxPtS',
        7618216, PaperResults(7.62, 71.81, 90.35, 804.17, 14.35), '1AhYnuRm88wvCeO0JV_tFKSMYzfqQKdSC'),
    Pair(
        'pvt_tiny_050_noah', 'pvt_tiny_050', 'pvt', 4, 1 / 2, 0.1,
        3549632, PaperResults(3.55, 68.5, 88.42, 1035.93, 20.47), '1qtsa7AbzHd-Ipet3sl1H67e1NdK4Ymzr',
        3543144, PaperResults(3.54, 65.33, 86.61, 1088.5, 23.75), '133GeiITuRQkOECKfAMfh8oKqrT_fKyga'),
    Pair(
        'mixer_s16_224_noah', 'mixer_s16_224', 'mixer', 4, 1 / 2, 0.1,
        18535264, PaperResults(18.54, 75.09, 92.22, 674.54, 6.81), '1fuZawsAVSRqqAUQzt7wi425MGKxOx_pK',
        18528264, PaperResults(18.53, 74.18, 91.56, 733.96, 7.18), '1wrvSh1WjslOBx3Hlp9iXXFzk2PIH6uwy'),
    Pair(
        'mixer_s16_075_224_noah', 'mixer_s16_075_224', 'mixer', 4, 1 / 2, 0.1,
        10758112, PaperResults(10.76, 72.32, 90.57, 929.1, 10.57), '13EH3iZ7WqDtIZbj9mpONzXMF-wfaepOv',
        10751112, PaperResults(10.75, 71.13, 90.07, 1050.2, 11.25), '1Ry4EiOALuyqP27Z_fkP3aBYWlZo_kk3R'),
    Pair(
        'mixer_s16_050_224_noah', 'mixer_s16_050_224', 'mixer', 4, 1 / 2, 0.1,
        5078112, PaperResults(5.08, 66.81, 87.07, 1615.76, 20.62), '1SdS4EgAOPg2SojiCnnbskv6d5pWx4kYZ',
        5071112, PaperResults(5.07, 65.22, 86.34, 2037.45, 23.88), '1jA-ycxakDSaNSWriCqVz1NcVABSpnnlk'),
    Pair(
        'mixer_b16_224_noah', 'mixer_b16_224', 'mixer', 4, 1 / 2, 0.1,
        59887472, PaperResults(59.88, 77.49, 93.27, 229.55, 2.05), '1zZZ3tHzItF_TW7oGpdJuj4s0-QBmpAMj',
        59880472, PaperResults(59.88, 77.14, 93.02, 236.49, 2.13), '1rnaWDRhlpCecKZTnjYUAraofXAIpXgKt'),
    Pair(
        'gmlp_ti16_224_noah', 'gmlp_ti16_224', 'gmlp', 4, 1 / 2, 0.1,
        5874328, PaperResults(5.87, 73.39, 91.81, 712.21, 12.31), '1KETgcHuacDo9BPzkFXAnnoTyNAlP9zSS',
        5867328, PaperResults(5.87, 72.05, 91.23, 776.58, 13.65), '1x5H2IpdQOGVtQ2iv9uXvkQYNxqYARLvZ'),
    Pair(
        'gmlp_ti16_075_224_noah', 'gmlp_ti16_075_224', 'gmlp', 4, 1 / 2, 0.1,
        3867896, PaperResults(3.91, 67.71, 88.32, 882.56, 17.29), '1Yy-b9-QpwiMb07W2-WL94pV5V0ZAcNYm',
        3860896, PaperResults(3.91, 65.95, 87.19, 987.63, 19.33), '1B9lEYLE81QTMxCFFn8SRXC56GIStr8ht'),
    Pair(
        'gmlp_ti16_050_224_noah', 'gmlp_ti16_050_224', 'gmlp', 4, 1 / 2, 0.1,
        2414424, PaperResults(2.41, 56.89, 81.0, 1140.75, 23.1), '1mKS8ElM_s8Qp6TrjsI0wZBhw7LkGGPFP',
        2407424, PaperResults(2.41, 54.99, 80.02, 1343.41, 26.95), '15G6S-1iY1326-343tiEb7Z05SLuscX5B'),
    Pair(
        'gmlp_s16_224_noah', 'gmlp_s16_224', 'gmlp', 4, 1 / 2, 0.1,
        19429656, PaperResults(19.42, 79.95, 94.86, 368.22, 5.28), '1C3xeP201OmzW3JdplaPmodsjUuQ2_Q-a',
        19422656, PaperResults(19.42, 79.65, 94.7, 381.12, 5.57), '14IBEnTbU43SutWVos201v7IjAQBOJ2ma'),
)}


def family(*names: str) -> List[Pair]:
    """The rows of one or several families, in the paper's order."""
    return [model for model in CATALOG.values() if model.family in names]


def find_row(name: str) -> Optional[Pair]:
    """The row of a NOAH model or of a vanilla twin; None for any other name."""
    return next((row for row in CATALOG.values() if name in (row.name, row.vanilla)), None)


def paper_results(name: str) -> Optional[PaperResults]:
    """What the paper prints of a model, NOAH or vanilla; None for any other name."""
    row = find_row(name)
    return row and (row.paper if name == row.name else row.vanilla_paper)


def drive_id(name: str) -> Optional[str]:
    """Google Drive id of the authors' checkpoint of a model, NOAH or vanilla; None for any other name."""
    row = find_row(name)
    return row and (row.drive_id if name == row.name else row.vanilla_drive_id)


def drive_page(name: str) -> str:
    """Address of the authors' checkpoint of a model, NOAH or vanilla, for a browser."""
    return f'https://drive.google.com/file/d/{drive_id(name)}/view'


TAG = 'osvai_in1k'  # of the authors' weights
NAMESPACE = 'noah-zoo'
RECORD = Path(__file__).parent / 'published.json'


@dataclass(frozen=True)
class Published:
    """A repository on the Hub as it was when it had been published, downloaded again and checked.

    Attributes:
        revision: Its commit.
        sha256: Of its `model.safetensors`.
    """
    revision: str
    sha256: str


PUBLISHED: Dict[str, Published] = {  # by repository; written by noah_zoo.publish
    repo_id: Published(**entry) for repo_id, entry in json.loads(RECORD.read_text(encoding='utf-8')).items()}


def weights_at(name: str) -> Dict[str, Any]:
    """Where the authors' weights of a model are, as entries of timm's pretrained cfg."""
    repo_id = f'{NAMESPACE}/{name}.{TAG}'
    published = PUBLISHED.get(repo_id)
    return {
        'url': drive_page(name),
        'hf_hub_id': f'{repo_id}@{published.revision}' if published else None}


@dataclass(frozen=True)
class Shipped:
    """Weights inside the package, by name and tag of the model.

    Attributes:
        file: The weights, safetensors.
        twin: The vanilla twin on the same images, in timm's Hub layout.
        model_args: Arguments of the model that the weights need.
        input_size: Channels, height and width.
        pool_size: Height and width of the feature map: the positions that the head sees.
        crop_pct: Share of the image that evaluation crops.
        label_names: Class names, in the order of the logits.
        top1: Test top-1 accuracy in percent, measured here (`docs/numbers.md`).
    """
    file: Path
    twin: Path
    model_args: Dict[str, Any]
    input_size: Tuple[int, int, int]
    pool_size: Tuple[int, int]
    crop_pct: float
    label_names: Tuple[str, ...]
    top1: float


FASHION_MNIST_CLASSES = (
    'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')
ASSETS = Path(__file__).parent / 'assets'
SHIPPED: Dict[str, Shipped] = {
    'mobilenetv2_035_noah.fashion_mnist': Shipped(
        ASSETS / 'mobilenetv2_035_noah.fashion_mnist.safetensors', ASSETS / 'mobilenetv2_035.fashion_mnist',
        dict(output_stride=16), (3, 64, 64), (4, 4), 1.0, FASHION_MNIST_CLASSES, 92.64),
}


TWINS = (  # vanilla twins that timm lacks
    'shufflenetv2_100', 'deit_tiny_075_patch16_224', 'deit_tiny_050_patch16_224', 'pvt_tiny', 'pvt_tiny_075',
    'pvt_tiny_050', 'mixer_s16_075_224', 'mixer_s16_050_224', 'gmlp_ti16_075_224', 'gmlp_ti16_050_224')
OTHERS = 'noah', 'reid_resnet50'  # the head on any model of timm; the backbone of re-identification


def released() -> List[str]:
    """The 50 names of the authors' release: every NOAH model and its vanilla twin, in the paper's order."""
    return [name for row in CATALOG.values() for name in (row.name, row.vanilla)]


def registered() -> List[str]:
    """The names that this package registers with timm: every NOAH model, the twins that timm lacks, and two more."""
    return [*CATALOG, *TWINS, *OTHERS]
