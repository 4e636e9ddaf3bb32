"""CSV files of images and labels: read right, or refused with file, line and what to do."""
import re

import pytest

from noah_zoo.data.factory import create_dataset
from noah_zoo.data.table import Csv, CsvLists

from .files import photo

LABELS = ['red', 'green', 'red;green']


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'images' / 'sub').mkdir(parents=True)
    for i in range(6):
        photo(i).save(tmp_path / 'images' / f'{i:03}.png')
    return tmp_path


def write(folder, *lines, header='file_name,labels', encoding='utf-8', end='\n'):
    (folder / 'train.csv').write_bytes((end.join([header, *lines]) + end).encode(encoding))


def rows(separator=';', quote=''):
    return [f'images/{i:03}.png,{quote}{LABELS[i % 3].replace(";", separator)}{quote}' for i in range(6)]


@pytest.mark.parametrize('lines, kwargs', [
    (rows(), {}),
    (rows(), dict(encoding='utf-8-sig', end='\r\n')),
    (rows(), dict(encoding='utf-16')),
    ([*rows(), ',', ' , '], {}),
    ([f' {row.replace(",", " , ")}' for row in rows()], {}),
    ([row.replace(',', ',"[\'').replace(';', "', '") + '\']"' for row in rows()], {}),
    ([row.replace('images/', '').replace('.png', '') for row in rows()], {}),
])
def test_several_labels(folder, lines, kwargs):
    write(folder, *lines, **kwargs)
    images = CsvLists(folder, 'train')
    assert images.class_names == ('green', 'red')
    assert images.labels.tolist() == [[0, 1], [1, 0], [1, 1]] * 2
    assert [path.rpartition('/')[2] for path in images.paths] == [f'{i:03}.png' for i in range(6)]


@pytest.mark.parametrize('separator, quote', [(',', '"'), ('|', ''), (' ', '')])
def test_other_separators_are_named(folder, separator, quote):
    write(folder, *rows(separator, quote))
    mark = re.escape(separator)
    with pytest.raises(ValueError, match=f"train.csv, line 4: 'red{mark}green' seems to be several labels; "
                                         f"give --label-separator '{mark}'"):
        CsvLists(folder, 'train')
    images = CsvLists(folder, 'train', separator=separator)
    assert images.class_names == ('green', 'red') and images.labels.sum() == 8
    names = sorted(('red', 'green', f'red{separator}green'))
    assert CsvLists(folder, 'train', separator=';').class_names == tuple(names)


def test_a_space_inside_of_a_name(folder):
    write(folder, 'images/000.png,golden retriever', 'images/001.png,red panda;golden retriever')
    assert CsvLists(folder, 'train').class_names == ('golden retriever', 'red panda')


@pytest.mark.parametrize('lines, kwargs, message', [
    ([*rows(), ',red'], {}, r'rows have no file name: line 8 \(no name\)'),
    ([*rows(), 'images/sub,red'], {}, r'rows name no image: line 8 \(images/sub\)'),
    ([*rows(), 'images/009.png,red'], {}, r'rows name no image: line 8 \(images/009.png\)'),
    ([row.replace('/', '\\') for row in rows()], {}, r'6 rows name no image: .*; write / instead of \\ between'),
    ([*rows(), 'red'], {}, 'line 8: 1 cells, and the header has 2'),
    ([row.replace(',', ';') for row in rows()], dict(header='file_name;labels'),
     "line 4: 3 cells, and the header has 2; put cells that contain ';' in quotes"),
    ([*rows(), rows()[0]], {}, r'2 rows repeat the file of another row: line 2 .*, line 8'),
    ([*rows()[:5], 'images/005.png,gr\xfcn'], dict(encoding='cp1252'),
     r'line 7: not UTF-8 \(byte 0xfc\); save it as "CSV UTF-8"'),
    ([*rows()[:5], 'images/005.png,red;;green'], {}, "line 7: an empty name among the labels 'red;;green'"),
    ([*rows()[:5], 'images/005.png,"[red"'], {}, None),
    ([*rows()[:5], 'images/005.png,"[red, green]"'], {}, r'line 7: \[red, green\] is not a list of labels'),
    ([*rows()[:5], '"images/005.png,red'], {}, 'line 7: unexpected end of data'),
    (rows(), dict(header='file,tags,x'), r"no column 'file_name' \(--input-key\), only file, tags, x"),
    ([], {}, 'no rows below the header'),
])
def test_messages_have_the_line(folder, lines, kwargs, message):
    write(folder, *lines, **kwargs)
    if message is None:
        assert '[red' in CsvLists(folder, 'train').class_names
        return
    with pytest.raises((ValueError, FileNotFoundError), match=f'^{re.escape(str(folder / "train.csv"))}.*{message}'):
        CsvLists(folder, 'train')


@pytest.mark.parametrize('header, name', [
    ('id,breed', '{}'), ('image_id,label', '{}.png'), ('file_name,label', 'images/{}.png')])
def test_one_label_per_row_as_on_kaggle(folder, header, name):
    write(folder, *(f'{name.format(f"{i:03}")},{["007", "7", "10"][i % 3]}' for i in range(6)), header=header)
    images = create_dataset('csv', str(folder), 'train')
    assert images.class_names == ('007', '7', '10') and images.labels.tolist() == [0, 1, 2] * 2
    image, label = images.read(4)
    assert label == 1 and image.tobytes() == photo(4).tobytes()


def test_columns_by_name(folder):
    write(folder, *(f'{i},{i % 2},images/{i:03}.png' for i in range(6)), header='row,kind,picture')
    with pytest.raises(ValueError, match="no column 'file_name'"):
        Csv(folder, 'train')
    images = Csv(folder, 'train', 'picture', 'kind')
    assert images.class_names == ('0', '1') and images.labels.tolist() == [0, 1] * 3


def test_one_label_is_needed(folder):
    write(folder, 'images/000.png,a', 'images/001.png,', header='file_name,label')
    with pytest.raises(ValueError, match=r'1 rows have no label: line 3 \(images/001.png\)'):
        Csv(folder, 'train')


def test_a_name_without_folder_that_is_there_twice(folder):
    photo(9).save(folder / 'images' / 'sub' / '000.png')
    write(folder, '000.png,a', header='file_name,label')
    with pytest.raises(ValueError, match=r'1 rows name several images: line 2 \(000.png\)'):
        Csv(folder, 'train')


def test_names_that_differ_in_case_only(folder, caplog):
    write(folder, 'images/000.png,Red', 'images/001.png,red', header='file_name,label')
    assert Csv(folder, 'train').class_names == ('Red', 'red') or Csv(folder, 'train').class_names == ('red', 'Red')
    assert "'Red' and 'red' differ in case only and are different classes" in caplog.text


def test_test_images_are_not_taken_for_validation(folder):
    write(folder, *rows())
    (folder / 'test.csv').write_bytes((folder / 'train.csv').read_bytes())
    with pytest.raises(FileNotFoundError, match='has none of validation.csv, valid.csv, val.csv'):
        CsvLists(folder, 'validation')
    assert len(CsvLists(folder, 'test')) == 6
