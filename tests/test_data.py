import itertools
import pickle
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, features
from scipy.io import savemat
from torch.testing import assert_close
from torchvision import tv_tensors

import data
import decoding
import tiny_data
from tiny_data import MAKERS


@pytest.fixture(params=MAKERS)
def made(request, tmp_path):
    layout, make = MAKERS[request.param]
    return layout, make(tmp_path)


@pytest.fixture
def folder(tmp_path):
    return tiny_data.make_folder(tmp_path)


def label_of(root, split="train", index=0, layout="folder"):
    return data.list_split(layout, root, split).pairs[index][1]


def test_every_way_to_store_every_data_set_is_tried():
    stored = [name for name, known in data.DATA_SETS.items() for _ in known.stored]
    assert [layout for layout, _ in MAKERS.values()] == stored


def test_every_layout_gives_images_and_class_indices(made):
    layout, root = made
    classes = {"folder": 3, "ade20k": 150}.get(layout, 171)
    for split, count in (("train", 4), ("val", 2)):
        found = data.open_split(layout, root, split)
        assert len(found) == len(found.pairs) == count
        assert len(found.classes) == classes
        seen = set()
        for image, label in (found[index] for index in range(count)):
            assert type(image) is tv_tensors.Image
            assert type(label) is tv_tensors.Mask
            assert image.dtype == label.dtype == torch.uint8
            assert image.shape == (3, *label.shape)
            seen |= set(label.unique().tolist())
        assert seen <= {*range(classes), 255}
        assert len(seen) > 2


def test_the_splits_share_no_file(made):
    train, val = (data.open_split(*made, split).pairs for split in ("train", "val"))
    assert not set(itertools.chain(*train)) & set(itertools.chain(*val))


@pytest.mark.parametrize("name", ["cocostuff10k", "cocostuff164k"])
def test_published_and_converted_labels_are_the_same_classes(tmp_path, name):
    labels = []
    for which in (name, f"{name} of mmseg"):
        layout, make = MAKERS[which]
        found = data.open_split(layout, make(tmp_path / which), "train")
        assert found.pairs[0][1].name.endswith("_labelTrainIds.png") == (which != name)
        labels.append([found[index][1] for index in range(len(found))])
    assert_close(*labels, rtol=0, atol=0)


# Numbers and names as the data sets' own lists have them (labels.txt, objectInfo150.txt).
NUMBERS = {
    "cocostuff10k": {0: None, 1: "person", 13: "stop sign", 92: "banner", 182: "wood"},
    "cocostuff10k of mmseg": {0: None, 1: "person", 12: "stop sign", 171: "wood"},
    "cocostuff164k": {255: None, 0: "person", 12: "stop sign", 91: "banner", 181: "wood"},
    "cocostuff164k of mmseg": {255: None, 0: "person", 11: "stop sign", 170: "wood"},
    "ade20k": {0: None, 1: "wall", 13: "person", 131: "screen", 150: "flag"},
    "folder": {255: None, 0: "class 0", 2: "class 2"},
}


@pytest.mark.parametrize("name", MAKERS)
def test_numbers_in_the_files_become_the_classes_of_these_names(tmp_path, name):
    layout, make = MAKERS[name]
    found = data.open_split(layout, make(tmp_path), "val")
    path = found.pairs[0][1]
    numbers = np.resize(list(NUMBERS[name]), (40, 56)).astype(np.uint8)
    if path.suffix == ".mat":
        savemat(path, {"S": numbers})
    else:
        Image.fromarray(numbers).save(path)
    names = dict(enumerate(found.classes))
    read = [names.get(index) for index in found[0][1].flatten().tolist()]
    assert read[: len(NUMBERS[name])] == list(NUMBERS[name].values())


def test_the_names_of_classes_are_complete_and_in_order(tmp_path):
    stuff = data.open_split("cocostuff10k", tiny_data.make_cocostuff10k(tmp_path), "val").classes
    assert len(set(stuff)) == 171
    assert list(stuff[80:]) == sorted(stuff[80:])  # 80 things in COCO's order, 91 stuff classes
    assert stuff[79:81] == ("toothbrush", "banner")
    never_annotated = {"street sign", "hat", "shoe", "eye glasses", "plate", "hair brush"}
    assert not never_annotated & set(stuff)
    assert len(set(data.read_classes(data.ADE))) == 150


def test_lists_give_the_order_of_cocostuff10k(tmp_path):
    root = tiny_data.make_cocostuff10k(tmp_path)
    names = root / "imageLists" / "train.txt"
    listed = names.read_text().split()[::-1]
    names.write_text("\n".join(listed) + "\n\n")
    pairs = data.open_split("cocostuff10k", root, "train").pairs
    assert [image.stem for image, _ in pairs] == [label.stem for _, label in pairs] == listed


@given(
    numbers=arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9))),
    mode=st.sampled_from(["P", "L", "I;16", "I"]),
    classes=st.integers(1, 255),
)
@settings(max_examples=100, deadline=None)
def test_every_mode_of_label_is_read_as_its_numbers_or_refused(
    tmp_path_factory, numbers, mode, classes
):
    path = tmp_path_factory.mktemp("labels") / "label.png"
    dtype = {"I;16": np.uint16, "I": np.int32}.get(mode, np.uint8)
    numbers = numbers.astype(dtype)
    image = Image.fromarray(numbers)
    if mode == "P":
        image.putpalette(bytes(range(255, -1, -1)) * 3)
    assert image.mode == mode
    image.save(path, "TIFF" if mode == "I" else "PNG")  # Pillow writes no PNG of this mode
    coding = data.Coding(data.lookup_table(range(classes)), "")
    wrong = sorted({n for n in numbers.flatten().tolist() if classes <= n != 255})
    if wrong:
        with pytest.raises(ValueError, match=re.escape(f"{path} must hold")) as error:
            data.read_label(path, coding)
        assert f"got {wrong[:10]}" in str(error.value)
    else:
        read = data.read_label(path, coding)
        assert_close(read.numpy(), numbers.astype(np.uint8), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_label_of_colours_is_refused_by_name(folder, mode):
    path = label_of(folder)
    with Image.open(path) as image:
        image.convert(mode).save(path)
    with pytest.raises(ValueError, match=rf"{path} must hold one class index .* mode {mode}\."):
        data.open_split("folder", folder, "train")[0]


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_a_label_whose_numbers_may_be_mixed_is_refused(folder, kind):
    path = label_of(folder)
    with Image.open(path) as image:
        image.save(path, kind)  # named .png
    with pytest.raises(ValueError, match=rf"{path} must hold .* as they are, got {kind}\. Save"):
        data.open_split("folder", folder, "train")[0]


def test_a_tiff_with_jpeg_inside_is_refused_whatever_it_is_called(folder):
    path = label_of(folder)
    with Image.open(path) as image:
        grey = image.convert("L")
    grey.save(path, "TIFF", compression="jpeg")  # named .png
    with pytest.raises(ValueError, match=rf"{path} must hold .* got TIFF with jpeg inside\. Save"):
        data.open_split("folder", folder, "train")[0]
    grey.save(path, "TIFF", compression="tiff_lzw")
    data.open_split("folder", folder, "train")[0]


@pytest.mark.parametrize("names", ["zone 1\nzone 2\nsky", "zone 1\nzone 2\nzone 3"])
def test_numbers_that_belong_to_names_are_kept(folder, names):
    (folder / "classes.txt").write_text(names)
    assert data.list_split("folder", folder, "train").classes == tuple(names.split("\n"))


def test_a_label_of_one_bit_has_two_classes(folder):
    path = label_of(folder)
    stripes = np.indices((40, 56))[0] % 3 == 0
    Image.fromarray(stripes).save(path)
    with Image.open(path) as image:
        assert image.mode == "1"
    _, label = data.open_split("folder", folder, "train")[0]
    assert_close(label.numpy(), stripes.astype(np.uint8), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_label_of_few_bits_that_pillow_scales_is_refused(folder, bits):
    path = label_of(folder)
    path.write_bytes(grey_png(np.ones((40, 56), np.uint8), bits))
    with Image.open(path) as image:
        assert np.unique(image).tolist() == [255 // (2**bits - 1)]  # of indices that are 1
    with pytest.raises(ValueError, match=rf"{path} must hold .* stored as L;{bits}\. Save"):
        data.open_split("folder", folder, "train")[0]


def grey_png(indices, bits):
    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    height, width = indices.shape
    planes = (indices[..., None] >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(planes.reshape(height, -1), axis=1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_an_image_of_more_bits_is_refused(folder, dtype):
    path = data.open_split("folder", folder, "train").pairs[0][0]
    with Image.open(path) as image:
        wide = Image.fromarray(np.array(image.convert("L")).astype(dtype) * 200)
    path.unlink()
    wide.save(path.with_suffix(".tif"))  # which is read like any other image
    with pytest.raises(ValueError, match=rf"{path.stem}.tif must have 8 bits a channel, got mode"):
        data.open_split("folder", folder, "train")[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_names_are_read_in_every_encoding_that_says_what_it_is(folder, encoding):
    (folder / "classes.txt").write_bytes("cl\u00e9\r\nciel\r\nb\u0153uf\r\n".encode(encoding))
    assert data.open_split("folder", folder, "train").classes == ("cl\u00e9", "ciel", "b\u0153uf")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
def test_names_in_another_encoding_are_refused(folder, encoding):
    path = folder / "classes.txt"
    names = "cl\u00e9\nciel\nvache\n" if encoding == "latin-1" else "sky\nroad\ncar\n"
    path.write_bytes(names.encode(encoding))
    with pytest.raises(ValueError, match=rf"{path} must be text in UTF-8, got .* Save it as UTF-8"):
        data.open_split("folder", folder, "train")


@pytest.mark.parametrize(
    "text",
    [
        "0: sky\n1: road\n2: car",
        "0 sky\n1 road\n2 car",
        "0\tsky\n1\troad\n2\tcar\n",
        "id,name\n0,sky\n1,road\n2,car\n",
        'index,name,red,green\n0,"sky",1,2\n1,"road",3,4\n2,"car",5,6\n',
    ],
)
def test_names_may_stand_behind_their_numbers(folder, text):
    (folder / "classes.txt").write_text(text)
    assert data.open_split("folder", folder, "train").classes == ("sky", "road", "car")


def test_a_number_may_be_part_of_a_name(folder):
    (folder / "classes.txt").write_text("2 doors\n4 doors\nno car")
    assert data.open_split("folder", folder, "train").classes == ("2 doors", "4 doors", "no car")
    (folder / "classes.txt").write_text("2 doors\n4 doors\n6 wheels")
    assert data.open_split("folder", folder, "train").classes[2] == "6 wheels"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1: sky\n2: road\n3: car", "in the order of their indices, 0 first, got .* 1, 2, 3"),
        ("0: sky\n1: road\n255: void", "0, 1, 255 .* give unlabelled pixels 255"),
        ("\n".join(f"class {n}" for n in range(300)), "300 names.* no more than 255"),
        ("sky\nroad\nsky", "3 lines with 2 names. Name every class once"),
        ("name\nsky\nroad", "got the line 'name' first, which looks like a header"),
        ("name,r,g,b\nsky,0,0,0\nroad,1,1,1", "got the line 'name,r,g,b' first, which looks like"),
        ("# classes\nsky\nroad", "got the line '# classes' first"),
        ("sky\n# wheels\nroad", "got the comment '# wheels'. Remove it"),
        ("1 tree\n0 sky", "in the order of their indices, 0 first, got .* 1, 0"),
        ("1 sky\n2 tree", "in the order of their indices, 0 first, got .* 1, 2"),
        ("sky: 1\ntree: 0", "names with numbers behind them, 'sky: 1'. Sort the lines"),
        ("road 7\nbuilding 11", "names with numbers behind them, 'road 7'. Sort the lines"),
        ("0 background\n1 thing\n255 void", "0, 1, 255 .* give unlabelled pixels 255"),
        ("id,r,g,b,name\n0,0,0,0,sky\n1,1,0,0,tree", "got the line '0,0,0,0,sky'"),
        ("0\t0.15\twall\n1\t0.1\tbuilding", "its number and its name, got the line .*wall"),
        ('["sky", "road"]\n', "first, which looks like a header, a comment or JSON"),
        ("crack\n", "at least two class names, got 'crack' alone. Write the background first"),
    ],
)
def test_names_whose_order_is_another_are_refused(folder, text, expected):
    path = folder / "classes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} must .*{expected}"):
        data.open_split("folder", folder, "train")


def test_what_a_folder_of_images_holds_beside_images_is_said(folder):
    images = folder / "images" / "train"
    assert data.left_out(images) == ""
    (images / "city").mkdir()
    (images / "a.jfif").touch()
    noted = data.check(data.open_split("folder", folder, "train")).notes
    assert any("holds what is left out: a.jfif, city. Images lie in the folder" in n for n in noted)
    for path in [*images.iterdir()]:
        if path.suffix != ".jfif" and path.is_file():
            path.rename(images / "city" / path.name)
    with pytest.raises(ValueError, match=r"found none\. .* left out: a\.jfif, city\. Images lie"):
        data.open_split("folder", folder, "train")


@pytest.mark.parametrize("suffix", [s.upper() for s in decoding.SUFFIXES] + [".webp"])
def test_images_of_every_suffix_are_read(folder, suffix):
    path = data.open_split("folder", folder, "train").pairs[0][0]
    with Image.open(path) as image:
        image.save(path.with_suffix(suffix))
    path.unlink()
    found = data.open_split("folder", folder, "train")
    assert len(found) == 4
    assert found[0][0].shape == (3, 40, 56)


def test_two_images_that_would_share_a_label_are_refused(folder):
    path = data.open_split("folder", folder, "val").pairs[0][0]
    path.with_suffix(".png").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=rf"got {path.name} and {path.stem}\.png\. Rename"):
        data.open_split("folder", folder, "val")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("{}.PNG", "rename {}.PNG."),
        ("{}_gtFine_labelIds.png", "the folder has {}_gtFine_labelIds.png."),
        ("{}_labelTrainIds.png", "the folder has {}_labelTrainIds.png."),
    ],
)
def test_of_a_label_that_is_called_otherwise_the_rule_is_said(folder, name, expected):
    path = label_of(folder, "val")
    path.rename(path.with_name(name.format(path.stem)))
    rule = rf"{path} is missing\. .* A label is called like its image, with \.png at the end"
    with pytest.raises(ValueError, match=f"{rule}.*{re.escape(expected.format(path.stem))}"):
        data.open_split("folder", folder, "val")


def test_a_label_whose_name_only_looks_the_same_is_told_from_it(folder):
    image, label = data.open_split("folder", folder, "val").pairs[0]
    image.rename(image.with_stem("Z\u00fcrich"))
    label.rename(label.with_stem("Zu\u0308rich"))
    with pytest.raises(ValueError, match=r"same name in other Unicode characters \(NFC, NFD\)"):
        data.open_split("folder", folder, "val")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_an_image_of_any_mode_becomes_rgb(folder, mode):
    path = data.open_split("folder", folder, "train").pairs[0][0]
    with Image.open(path) as image:
        other = image.convert(mode)
    assert other.mode == mode
    path.unlink()
    other.save(path.with_suffix(".jpeg" if mode == "CMYK" else ".png"))
    image, _ = data.open_split("folder", folder, "train")[0]
    assert image.shape == (3, 40, 56)
    assert image.float().std() > 0


def turned(pixels, orientation):
    """The pixels as a viewer shows them, by the EXIF standard."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_an_image_is_read_as_it_is_shown_in_every_format(tmp_path, suffix, orientation):
    blocks = np.random.default_rng(0).integers(0, 2, (5, 7, 1), np.uint8) * 255
    pixels = blocks.repeat(16, 0).repeat(16, 1).repeat(3, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    about = {"tiffinfo": {0x0112: orientation}} if suffix == ".tif" else {"exif": exif}
    path = tmp_path / f"image{suffix}"
    Image.fromarray(pixels).save(path, **about)
    shown = turned(pixels, orientation)
    read = data.read_image(path).permute(1, 2, 0).numpy()
    assert read.shape == shown.shape
    assert (np.abs(read.astype(int) - shown) > 100).mean() < 0.01
    assert decoding.orientation_of(path) == orientation


def test_an_orientation_that_cannot_be_read_turns_nothing(tmp_path):
    path = tmp_path / "image.png"
    pixels = np.zeros((40, 56, 3), np.uint8)
    Image.fromarray(pixels).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03")
    assert data.read_image(path).shape == (3, 40, 56)
    assert decoding.orientation_of(path) == 1


def turn(path, orientation):
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(path, exif=exif)


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_a_check_tells_of_images_that_are_shown_turned(folder, orientation):
    found = data.open_split("folder", folder, "train")
    turn(found.pairs[0][0], orientation)
    report = data.check(found)
    assert report.problems == []
    (note,) = report.notes
    assert note.startswith("1 images have an EXIF orientation and are read as viewers show them")
    assert f"{found.pairs[0][0]} ({orientation})" in note
    assert data.check(data.open_split("folder", folder, "val")).notes == ()


def test_a_label_that_was_not_turned_as_its_image_is_refused(folder):
    path, label = data.open_split("folder", folder, "train").pairs[0]
    turn(path, 6)
    with pytest.raises(ValueError, match=rf"{label} must .* \(56, 40\), got \(40, 56\)\. .*EXIF"):
        data.open_split("folder", folder, "train")[0]
    with Image.open(label) as image:
        image.rotate(-90, expand=True).save(label)
    image, read = data.open_split("folder", folder, "train")[0]
    assert image.shape[1:] == read.shape == (56, 40)


@pytest.mark.parametrize("kind", [0, 1], ids=["image", "label"])
@pytest.mark.parametrize("layout", ["folder", "cocostuff10k"])
def test_a_truncated_file_is_named(tmp_path, layout, kind):
    MAKERS[layout][1](tmp_path)
    found = data.open_split(layout, tmp_path, "train")
    path = found.pairs[1][kind]
    whole = path.read_bytes()
    for kept in (0, 7, 30, len(whole) // 4):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=rf"{path} cannot be read") as error:
            found[1]
        assert "BufferedReader" not in str(error.value)


@pytest.mark.parametrize(("chunk", "length"), [(b"IHDR", 5), (b"IDAT", 20)])
def test_a_png_whose_chunks_are_broken_is_named(folder, chunk, length):
    # Pillow raises ValueError for the first and SyntaxError for the second.
    path = label_of(folder)
    noise = np.random.default_rng(0).integers(0, 3, (40, 56), np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    start = whole.index(chunk)
    path.write_bytes(whole[: start - 4] + struct.pack(">I", length) + whole[start:])
    with pytest.raises(ValueError, match=rf"{path} cannot be read: "):
        data.open_split("folder", folder, "train")[0]


@pytest.mark.skipif(not features.check("avif"), reason="needs a Pillow that reads AVIF")
def test_a_broken_avif_by_whatever_name_is_named(folder):
    path = next((folder / "images" / "train").iterdir())
    Image.new("RGB", (56, 40)).save(path, "AVIF")
    path.write_bytes(path.read_bytes().replace(b"iloc", b"xxxx"))  # Pillow: a RuntimeError
    with pytest.raises(ValueError, match=rf"{path} cannot be read: Failed to decode"):
        data.read_image(path)


def test_a_decompression_bomb_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 56 - 1)  # above it Pillow only warns
    with pytest.raises(ValueError, match="cannot be read: .*decompression bomb"):
        data.open_split("folder", folder, "train")[0]


@pytest.mark.parametrize("numbers", [[[1.5, 2]], [["a", "b"]], [[np.nan, 1]], [[[1, 2]]]])
def test_a_label_map_that_is_no_map_is_named(tmp_path, numbers):
    root = tiny_data.make_cocostuff10k(tmp_path)
    found = data.open_split("cocostuff10k", root, "train")
    path = found.pairs[0][1]
    savemat(path, {"S": np.array(numbers)})
    with pytest.raises(ValueError, match=rf"{path} must hold a map S of whole numbers"):
        found[0]
    savemat(path, {"T": np.array(numbers)})
    with pytest.raises(ValueError, match=rf"{path} cannot be read for its label map S"):
        found[0]


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.uint16])
def test_a_label_map_of_any_type_of_number_is_read(tmp_path, dtype):
    root = tiny_data.make_cocostuff10k(tmp_path)
    found = data.open_split("cocostuff10k", root, "train")
    savemat(found.pairs[0][1], {"S": np.full((40, 56), 13, dtype)})
    assert found.classes[found[0][1].unique().item()] == "stop sign"
    savemat(found.pairs[0][1], {"S": np.full((40, 56), -1, np.int16)})
    with pytest.raises(ValueError, match=r"got \[-1\]"):
        found[0]


def test_labels_of_version_1_0_are_told_from_those_of_1_1(tmp_path):
    root = tiny_data.make_cocostuff10k(tmp_path)
    found = data.open_split("cocostuff10k", root, "train")
    savemat(found.pairs[0][1], {"S": np.resize([1, 12, 26, 172], (40, 56)).astype(np.uint8)})
    with pytest.raises(ValueError, match=r"unused, got \[12, 26\]\. Version 1\.0 .* Get"):
        found[0]


def test_version_1_0_is_told_by_its_172_names(tmp_path):
    root = tiny_data.make_cocostuff10k(tmp_path)
    found = data.open_split("cocostuff10k", root, "train")
    numbers = np.full((40, 56), 1)  # "unlabeled" there, "person" in version 1.1
    names = np.array(["unlabeled", *found.classes], object)
    savemat(found.pairs[0][1], {"S": numbers, "names": names})
    with pytest.raises(ValueError, match=r"must be of .* 1\.1, got the 172 names of version 1\.0"):
        found[0]
    savemat(found.pairs[0][1], {"S": numbers, "names": np.array(["a"] * 182, object)})
    assert found.classes[found[0][1].unique().item()] == "person"


def set_labels(folder, split, change):
    for _, path in data.open_split("folder", folder, split).pairs:
        with Image.open(path) as image:
            numbers = np.array(image)
        Image.fromarray(change(numbers).astype(np.uint8)).save(path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_of_0_and_255_are_a_problem_with_their_cause(folder, split):
    (folder / "classes.txt").write_text("background\nthing\n")
    set_labels(folder, "train", lambda numbers: np.where(numbers == 1, 255, 0))
    set_labels(folder, "val", lambda numbers: np.where(numbers == 1, 255, 0))
    (problem,) = data.check(data.open_split("folder", folder, split)).problems
    assert problem.startswith(f"{folder / 'labels' / split} must show at least two classes, found")
    assert "only 'background'" in problem
    assert "in masks of 0 and 255 give the foreground its index in place of 255" in problem


def test_a_class_without_a_training_pixel_is_a_problem_with_its_name(folder):
    set_labels(folder, "train", lambda numbers: np.where(numbers == 2, 0, numbers))
    (problem,) = data.check(data.open_split("folder", folder, "train")).problems
    assert "must show every class, found no pixel of 1: class 2. Leave out" in problem
    set_labels(folder, "val", lambda numbers: np.where(numbers == 2, 0, numbers))
    assert data.check(data.open_split("folder", folder, "val")).problems == []


def test_an_image_without_a_labelled_pixel_is_a_problem(folder):
    path = label_of(folder)
    Image.fromarray(np.full((40, 56), 255, np.uint8)).save(path)
    (problem,) = data.check(data.open_split("folder", folder, "train")).problems
    assert problem.startswith(f"{path} has no labelled pixel")


def test_a_number_that_means_void_elsewhere_is_refused_with_the_one_here(folder):
    set_labels(folder, "train", lambda numbers: np.where(numbers == 255, 11, numbers))
    with pytest.raises(ValueError, match=r"got \[11\]\. .*give unlabelled pixels 255"):
        list(data.open_split("folder", folder, "train"))


def test_a_label_of_another_size_is_refused(folder):
    path = label_of(folder, index=1)
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(path)
    with pytest.raises(ValueError, match=rf"{path} must have .*\(40, 64\), got \(40, 50\)\. Make"):
        data.open_split("folder", folder, "train")[1]


def test_a_missing_label_is_named_when_the_split_is_opened(made):
    path = data.open_split(*made, "val").pairs[1][1]
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path} is missing\. .* Missing in all: 1; .*--check"):
        data.open_split(*made, "val")


def test_a_missing_image_is_named_when_the_split_is_opened(tmp_path):
    root = tiny_data.make_cocostuff10k(tmp_path)
    path = data.open_split("cocostuff10k", root, "val").pairs[0][0]
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path} is missing"):
        data.open_split("cocostuff10k", root, "val")


def test_an_empty_folder_is_named_with_the_command_that_fills_it(tmp_path):
    for layout, part in (
        ("cocostuff10k", "images/train2014"),
        ("cocostuff164k", "images/train2017"),
        ("ade20k", "images/training"),
    ):
        expected = rf"{tmp_path / part} must .* found none\. Run .*prepare_data\.py {layout} "
        with pytest.raises(ValueError, match=expected):
            data.open_split(layout, tmp_path, "train")
    with pytest.raises(ValueError, match=rf"{tmp_path / 'classes.txt'} is missing"):
        data.open_split("folder", tmp_path, "train")


def test_a_folder_that_is_not_there_is_named_with_the_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for layout in data.DATA_SETS:
        expected = rf"^nope is no folder, seen from {tmp_path}\. .* with --data-root\."
        with pytest.raises(ValueError, match=expected):
            data.open_split(layout, "nope", "val")


def test_hidden_files_are_not_images(folder):
    (folder / "images" / "train" / "._000000000001.jpg").touch()  # as macOS leaves them
    assert len(data.open_split("folder", folder, "train")) == 4


def test_layout_and_split_are_checked(folder):
    with pytest.raises(ValueError, match="layout must be one of cocostuff10k, .* got 'voc'"):
        data.open_split("voc", folder, "train")
    with pytest.raises(ValueError, match="split must be .* got 'test'"):
        data.open_split("folder", folder, "test")


def test_opening_a_split_reads_no_image(made, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    monkeypatch.setattr(decoding, "loadmat", None)
    assert len(data.open_split(*made, "train")) == 4


def test_a_split_reaches_worker_processes(made):
    found = data.open_split(*made, "val")
    assert_close(pickle.loads(pickle.dumps(found))[0], found[0], rtol=0, atol=0)


def test_a_check_of_whole_data_finds_nothing_and_counts_by_hand(made):
    found = data.open_split(*made, "train")
    report = data.check(found)
    # Four images cannot show 150 classes.
    assert len(report.problems) == (len(found.classes) > 3)
    assert all("must show every class, found no pixel of" in text for text in report.problems)
    labels = [found[index][1] for index in range(len(found))]
    for value in (0, 1, 255):
        assert report.pixels[value] == sum((label == value).sum().item() for label in labels)
        assert report.images[value] == sum((label == value).any().item() for label in labels)
    assert report.pixels.sum() == sum(label.numel() for label in labels)


def test_a_check_finds_every_problem(folder):
    (_, a), (b_image, b), (c_image, _), (_, d) = data.open_split("folder", folder, "train").pairs
    a.unlink()
    b_image.write_bytes(b_image.read_bytes()[:500])
    Image.fromarray(np.full((40, 64), 7, np.uint8)).save(b)
    c_image.unlink()
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(d)
    problems = data.check(data.list_split("folder", folder, "train")).problems
    assert len(problems) == 5
    for path, text in (
        (a, "is missing"),
        (b_image, "cannot be read"),
        (b, "got [7]"),
        (label_of(folder).with_stem(c_image.stem), "has no image"),
        (d, "must have the height and width"),
    ):
        assert any(str(path) in problem and text in problem for problem in problems)
