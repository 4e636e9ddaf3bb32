"""What a run leaves in its folder."""
import os

import pytest
import timm
from safetensors.torch import save_file

from noah_zoo.training import configure, train
from noah_zoo.training.run_folder import RunFolder

from ..data.files import make_folder


def test_a_run_goes_on_with_its_classes_only(tmp_path):
    folder = RunFolder(str(tmp_path))
    folder.check_classes(['a', 'b'], 'auto')  # a new run
    folder.begin(configure('resnet18', str(tmp_path)), ['a', 'b', 'ç'], 0, {})
    folder.check_classes(('a', 'b', 'ç'), 'auto')
    other = RunFolder(str(tmp_path / 'other'))  # a branch of it
    for resume, goes_on in (('auto', folder), (str(tmp_path / 'checkpoints' / '3'), other)):
        for names, told in (
                (['a', 'b', 'c'], "other classes: without 'ç' and with 'c'$"),
                (['a', 'b'], "other classes: without 'ç'$"),
                (['a', 'b', 'c', 'ç'], "other classes: with 'c'$"), (['b', 'a', 'ç'], "their order was 'a', 'b', 'ç'")):
            with pytest.raises(ValueError, match=told):
                goes_on.check_classes(names, resume)
    (tmp_path / 'classes.json').unlink()  # of a run from before
    folder.check_classes(['x'], 'auto')
    (tmp_path / 'best').mkdir()
    (tmp_path / 'best/config.json').write_text('{"label_names": ["a", "b"]}')
    with pytest.raises(ValueError, match="without 'a', 'b' and with 'x'"):
        folder.check_classes(['x'], 'auto')


def test_names_of_any_bytes(tmp_path):
    names = [os.fsdecode(b'caf\xe9'), 'b']
    folder = RunFolder(str(tmp_path))
    folder.begin(configure('resnet18', str(tmp_path)), names, 0, {})
    folder.check_classes(names, 'auto')


def test_a_renamed_class_stops_a_run_that_goes_on(tmp_path):
    make_folder(tmp_path / 'data', {'cat': 8, 'dog': 8})
    config = configure(
        'mobilenetv2_035_noah', str(tmp_path / 'run'), 'none', dataset='folder', data_dir=str(tmp_path / 'data'),
        img_size=32, epochs=1, batch_size=8, workers=0, cpu=True, resume='auto')
    train(config)
    (tmp_path / 'run/summary.json').unlink()  # as if it had not come to its end
    for split in ('train', 'validation'):
        os.rename(tmp_path / 'data' / split / 'dog', tmp_path / 'data' / split / 'wolf')
    with pytest.raises(ValueError, match="run cannot go on with other classes: without 'dog' and with 'wolf'"):
        train(config)


def test_no_path_of_the_machine_is_kept_with_the_weights(tmp_path):
    secret = tmp_path / 'secret' / 'weights.safetensors'
    secret.parent.mkdir()
    save_file(timm.create_model('mobilenetv2_035').state_dict(), secret)
    make_folder(tmp_path / 'data', {'cat': 8, 'dog': 8})
    for name, model, kwargs in (
            ('own', 'mobilenetv2_035_noah', {}), ('any', 'noah', dict(backbone='mobilenetv2_035'))):
        config = configure(
            model, str(tmp_path / name), 'none', dataset='folder', data_dir=str(tmp_path / 'data'), img_size=32,
            epochs=1, batch_size=8, workers=0, cpu=True,
            model_kwargs=dict(pretrained_backbone=str(secret), init='random', **kwargs))
        train(config)
        best = tmp_path / name / 'best'
        assert (best / 'config.json').exists()
        for file in best.rglob('*'):
            assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes(), file
        assert timm.create_model(f'local-dir:{best}', pretrained=True).num_classes == 2
