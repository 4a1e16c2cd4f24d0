"""photos.py: images decoded once and read batch by batch, against torchvision's and PIL's own reading."""

import os
import shutil

import numpy as np
import pytest
import torch
import torchvision
from photo_files import GREY, RGB, SIZE, album, draw, fill, load, parts
from PIL import Image
from torchvision.transforms import v2

import fedmitr as fm
from fedmitr.client.fusefl import FusionClient
from fedmitr.core.store import Store
from fedmitr.data import photos
from fedmitr.evaluation.foreground import surviving_patches, token_features
from fedmitr.evaluation.metrics import accuracy, predict
from fedmitr.settings.schema import FuseflSettings, TaskSettings

# Pixels.


@pytest.mark.parametrize("mode, stats", [("RGB", RGB), ("L", GREY)])
def test_pixels_of_square_images_are_pils_own_normalised(folder, mode, stats):
    read = album(folder, stats=stats).images[:]
    mean, std = stats
    for image, (path, _) in zip(read, torchvision.datasets.ImageFolder(folder).samples, strict=True):
        small = Image.open(path).convert(mode).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        by_hand = (torch.tensor(np.array(small)).view(SIZE, SIZE, -1).permute(2, 0, 1) / 255 - mean) / std
        torch.testing.assert_close(image, by_hand)


@pytest.mark.parametrize("size", [(24, 16), (16, 40), (9, 7)])
def test_the_shorter_side_is_resized_and_the_centre_cut_out(size, tmp_path):
    for name in ("a", "b"):
        draw(tmp_path / name / "0.png", 3, size)
    read = album(tmp_path).images[0] * RGB[1] + RGB[0]
    image = v2.functional.to_image(Image.open(tmp_path / "a" / "0.png"))
    theirs = v2.Compose([v2.Resize(SIZE, antialias=True), v2.CenterCrop(SIZE)])(image) / 255
    assert (read - theirs).abs().mean() < 0.02 < (theirs - theirs.mean((1, 2), True)).abs().mean()


def test_a_photo_taken_sideways_is_put_upright(tmp_path):
    for name in ("a", "b"):
        draw(tmp_path / name / "0.png", 3)
    image = Image.open(tmp_path / "a" / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b" / "0.png", exif=exif)
    upright, turned = album(tmp_path, size=10).images[:]
    torch.testing.assert_close(turned, upright)


def test_modes_other_than_rgb_are_read(tmp_path):
    for k, mode in enumerate(("L", "1", "P", "RGBA", "CMYK", "RGB")):
        path = tmp_path / "ab"[k % 2] / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (10, 10), "white").convert(mode).save(path)
    for stats in (RGB, GREY):
        read = album(tmp_path, stats=stats).images[:] * stats[1] + stats[0]
        torch.testing.assert_close(read, torch.ones(6, len(stats[0]), SIZE, SIZE))


# Photos in place of a tensor.


@pytest.fixture
def both(folder):
    """Photos that are resized when read, and the same images as a tensor."""
    whole = album(folder).images
    index = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:20]
    taken = photos.Photos(whole.pixels, index, 12, RGB)
    return taken, taken[:]


INDICES = [3, -1, slice(2, 9), slice(None, None, 3), [4, 4, 0], torch.tensor([7, 1]), torch.tensor(5)]
INDICES += [torch.arange(20) % 3 == 0, torch.empty(0, dtype=torch.long)]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexed_photos_are_the_indexed_tensor(both, index):
    taken, tensor = both
    assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert torch.equal(taken[index], tensor[index])


def test_the_rest_of_photos_is_like_a_tensor(both):
    taken, tensor = both
    assert taken.shape == tensor.shape and len(taken) == len(tensor) and taken.device == tensor.device
    split = list(taken.split(6))
    assert [len(s) for s in split] == [6, 6, 6, 2] and torch.equal(torch.cat(split), tensor)
    pick = torch.tensor([9, 2, 2])
    assert torch.equal(taken.take(pick)[:], tensor[pick])
    assert torch.equal(taken.take(pick).take(torch.tensor([1]))[0], tensor[2])
    assert taken.to("meta").device.type == "meta" and taken.to("cpu")[0].equal(tensor[0])
    with pytest.raises(IndexError):
        taken[20]


class Fence:
    """Stands before the pixels and writes down which rows are read."""

    def __init__(self, pixels):
        self.pixels, self.shape, self.read = pixels, pixels.shape, []

    def __getitem__(self, rows):
        self.read += rows.tolist()
        return self.pixels[rows]


def test_nothing_is_read_but_what_is_indexed(folder):
    whole = album(folder)
    assert isinstance(whole.images.pixels, np.memmap) and whole.images.pixels.dtype == np.uint8
    fence = Fence(whole.images.pixels)
    images = photos.Photos(fence, whole.images.index, SIZE, RGB)
    split = fm.Split(images, whole.labels).subset(torch.arange(10, 30)).subset(torch.tensor([4, 0, 7]))
    assert split.images.shape == (3, 3, SIZE, SIZE) and len(split) == 3
    assert fence.read == []
    batches = split.images.to("cpu").split(2)
    assert fence.read == []
    next(batches)
    assert fence.read == [14, 10]
    split.images[2]
    assert fence.read == [14, 10, 17]


# Training and measuring.


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A model, a split of Photos and the same split of a tensor."""
    root = fill(tmp_path_factory.mktemp("shared") / "data", each=12)
    vit = fm.create_vit("vit_micro", 3, pretrained=True)
    found = photos.load_photos(TaskSettings(name="image-folder", data_dir=str(root)), 24, GREY)
    lazy = photos.Photos(found.images.pixels[:, ::2, ::2], found.images.index, 24, GREY)  # resized when read
    return vit, fm.Split(lazy, found.labels), fm.Split(lazy[:], found.labels)


TRAINING = fm.Settings.load("smoke", {"client.epochs": 2, "client.batch_size": 7}).client


def test_training_on_photos_gives_the_weights_of_training_on_the_tensor(shared):
    vit, lazy, held = shared
    digests = {fm.train_client(vit, split, TRAINING, client=0).digest for split in (lazy, held)}
    assert len(digests) == 1


def test_a_fusion_client_with_photos_sends_what_one_with_the_tensor_sends(shared, tmp_path):
    vit, *splits = shared
    sent = []
    for k, split in enumerate(splits):
        store = Store(tmp_path / str(k))
        client = FusionClient(vit, split, TRAINING, FuseflSettings(), store, client=0, key="k")
        sent.append(client.train_stage(0, {}))
    assert sent[0].keys() == sent[1].keys() and all(sent[0][n].equal(sent[1][n]) for n in sent[0])


def test_photos_are_measured_as_the_tensor_is(shared):
    vit, lazy, held = shared
    vit = vit.eval()
    assert torch.equal(predict(vit, lazy.images, 10), predict(vit, held.images, 10))
    assert accuracy(vit, lazy) == accuracy(vit, held)
    assert np.array_equal(token_features(vit, lazy.images), token_features(vit, held.images))
    ensemble = fm.Ensemble([fm.train_client(vit, held, TRAINING, client=0)])
    left = [surviving_patches(ensemble, split.images, (0.3, 0.3)) for split in (lazy, held)]
    assert torch.equal(*left)


# The decoded images in the store.


def test_a_second_load_decodes_nothing(folder, tmp_path, forbid):
    first = load(folder, cache=tmp_path / "cache")
    forbid(photos, "decode", "squared")
    again = load(folder, cache=tmp_path / "cache")
    for a, b in zip(parts(first), parts(again), strict=True):
        assert torch.equal(a.images[:], b.images[:]) and torch.equal(a.labels, b.labels)
    assert first.classes == again.classes and first.digest == again.digest


def test_the_same_files_elsewhere_are_the_same_data(folder, tmp_path, forbid):
    first = load(folder, cache=tmp_path / "cache")
    shutil.copytree(folder, tmp_path / "moved")  # keeps the times
    forbid(photos, "decode")
    assert load(tmp_path / "moved", cache=tmp_path / "cache").digest == first.digest


CHANGES = {
    "an image more": lambda root: draw(root / "ant" / "new.png", 77),
    "an image less": lambda root: (root / "ant" / "3.png").unlink(),
    "another name": lambda root: (root / "ant").rename(root / "asp"),
    "another content": lambda root: draw(root / "ant" / "3.png", 78),
    "another time": lambda root: os.utime(root / "ant" / "3.png", ns=(1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_other_data(folder, tmp_path, change):
    before = album(folder, cache=tmp_path / "cache")
    CHANGES[change](folder)
    after = album(folder, cache=tmp_path / "cache")
    assert after.digest != before.digest
    assert torch.equal(after.images[:], album(folder).images[:])
    assert len(list((tmp_path / "cache" / "image-folder").iterdir())) == 2


def test_other_sizes_and_channels_lie_beside(folder, tmp_path):
    shapes = [
        album(folder, size=size, stats=stats, cache=tmp_path / "cache").images.pixels.shape
        for size, stats in ((SIZE, RGB), (SIZE, GREY), (6, RGB))
    ]
    assert shapes == [(30, SIZE, SIZE, 3), (30, SIZE, SIZE, 1), (30, 6, 6, 3)]


def test_a_decode_that_is_stopped_leaves_nothing(folder, tmp_path, monkeypatch):
    whole, done = photos.squared, []

    def stopped(*given):
        if len(done) == 17:
            raise KeyboardInterrupt
        done.append(given)
        return whole(*given)

    monkeypatch.setattr(photos, "squared", stopped)
    with pytest.raises(KeyboardInterrupt):
        album(folder, cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "image-folder").iterdir()) == []
    monkeypatch.setattr(photos, "squared", whole)
    assert len(album(folder, cache=tmp_path / "cache").labels) == 30


def test_a_full_disk_is_one_line(folder, tmp_path, monkeypatch, one_line):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(photos, "write_json", full)
    with pytest.raises(fm.BadInput) as error:
        album(folder, cache=tmp_path / "cache")
    one_line(error.value, "cache", "GB", "No space left on device")
    assert list((tmp_path / "cache" / "image-folder").iterdir()) == []


def test_a_damaged_cache_is_named(folder, tmp_path, one_line):
    album(folder, cache=tmp_path / "cache")
    (pixels,) = (tmp_path / "cache").rglob("pixels.npy")
    pixels.write_bytes(pixels.read_bytes()[:300])
    with pytest.raises(fm.BadInput) as error:
        album(folder, cache=tmp_path / "cache")
    one_line(error.value, "damaged: delete", str(pixels.parent))


def test_without_a_cache_folder_nothing_is_left_beside_the_images(folder):
    before = sorted(folder.rglob("*"))
    album(folder)
    assert sorted(folder.rglob("*")) == before


def test_broken_images_are_named_counted_and_left_out(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FEDMITR_STATIC", "1")  # no progress bar
    cut = (folder / "ant" / "2.png").read_bytes()
    (folder / "ant" / "2.png").write_bytes(cut[:60])
    for k in range(3):
        (folder / "bee" / f"x{k}.jpg").write_bytes(b"no image")
    (folder / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    found = album(folder, cache=tmp_path / "cache")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "5 of 34 images" in line and "ant/2.png, bee/x0.jpg, bee/x1.jpg, …" in line
    assert torch.bincount(found.labels).tolist() == [9, 10, 10]
    again = album(folder, cache=tmp_path / "cache")
    assert torch.equal(again.labels, found.labels)
    good = [p for p, _ in torchvision.datasets.ImageFolder(folder, is_valid_file=readable).samples]
    assert len(good) == 29
    for image, path in zip(again.images[:], good, strict=True):
        alone = Image.open(path).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        torch.testing.assert_close(image, (v2.functional.to_image(alone) / 255 - RGB[0]) / RGB[1])


def readable(path):
    try:
        Image.open(path).load()
    except Exception:
        return False
    return True
