"""Where images come from: segmentation, saliency, edges, classification; augmentation, loaders.

    raw set        dataset[i] -> (PIL RGB image, PIL 'L' label)      files or generated pictures
    Samples        samples[epoch, i] -> (float (3, H, W), int64 (H, W))       transform applied
    make_loader    batches; the order and every random crop depend on (seed, epoch, index) only

The default set, `synthetic`, needs no file. Each real set is one function whose docstring shows
the folder tree it expects; your own data go through `folder` (or copy a ten-line function).
Every wrong input ends in an InputError of one sentence, raised as early as it can be known.
"""
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

# PyPI's torchvision wheel is built for CUDA. Beside a CPU-only torch two of its compiled operators
# are missing and the import fails; declaring their signatures is enough, nothing here calls them.
try:
    import torchvision
except RuntimeError:
    _OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # lives as long as this module
    for _name in ("nms", "qnms"):
        _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
from torchvision import tv_tensors
from torchvision.transforms import v2

IGNORE = 255  # label value that neither the losses nor mIoU count
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


# --------------------------------------------------------------------------------------------------
# Synthetic street scenes: OURS, there is no paper behind them
# --------------------------------------------------------------------------------------------------
# They exist so that a search can be tried without a download and still has something to find:
#   resolution  poles are 1-3 pixels wide, signs and far people a few pixels high
#   context     road, pavement and facades share one distribution of colour and grain, grass and
#               tree crowns another; a wet road looks like water; a poster looks like a sign, but
#               hangs on a wall and not on a pole; a tree's trunk looks like a pole
#   scale       the perspective draws the same car 3 to 30 pixels wide
# Only integers, + - * / and Pillow's drawing are used, no sin or exp whose last bit depends on the
# processor: the same numpy and Pillow versions give the same picture anywhere.

SCENE_CLASSES = ("sky", "building", "road", "pavement", "water", "grass", "tree", "pole", "sign",
                 "car", "person")
SKY, BUILDING, ROAD, PAVEMENT, WATER, GRASS, TREE, POLE, SIGN, CAR, PERSON = range(11)
SCENE_PALETTE = [(70, 130, 180), (128, 0, 0), (128, 64, 128), (244, 35, 232), (0, 200, 255),
                 (152, 251, 152), (60, 120, 30), (200, 200, 120), (250, 220, 0), (0, 0, 200),
                 (220, 20, 60)]
# Standard deviation of the grain, in grey levels: one pixel fine, and in patches of H/16.
FINE_GRAIN = np.full(256, 9, np.float32)
COARSE_GRAIN = np.full(256, 8, np.float32)
FINE_GRAIN[[SKY, WATER, GRASS, TREE]] = 3, 5, 17, 17
COARSE_GRAIN[[SKY, WATER, GRASS, TREE]] = 6, 8, 16, 16
SPLIT_IDS = {"train": 0, "val": 1, "test": 2}


class Canvas:
    """A picture and its label drawn in step. Points (x, y) in pixels, boxes (x0, y0, x1, y1)."""

    def __init__(self, height, width, colour):
        self.image = Image.new("RGB", (width, height), colour)
        self.label = Image.new("L", (width, height), SKY)
        self.pens = ImageDraw.Draw(self.image), ImageDraw.Draw(self.label)

    def polygon(self, points, colour, label):
        for pen, fill in zip(self.pens, (colour, label)):
            pen.polygon(points, fill=fill)

    def ellipse(self, box, colour, label):
        for pen, fill in zip(self.pens, (colour, label)):
            pen.ellipse(box, fill=fill)

    def box(self, box, colour, label):
        for pen, fill in zip(self.pens, (colour, label)):
            pen.rectangle(box, fill=fill)

    def line(self, points, colour, label, width=1):
        for pen, fill in zip(self.pens, (colour, label)):
            pen.line(points, fill=fill, width=max(1, round(width)))


def _stone(rng):
    """A grey with a slight tint, the same distribution for road, pavement and walls."""
    return tuple(int(c) for c in rng.integers(75, 165) + rng.integers(-14, 15, 3))


def _leaves(rng):
    """A green, the same distribution for grass and tree crowns."""
    return tuple(int(c) for c in np.array([75, 110, 50]) + rng.integers(-22, 23, 3))


def _vivid(rng):
    """A strong colour, the same distribution for cars, signs, posters and clothes."""
    hues = ((190, 40, 40), (40, 70, 180), (225, 190, 50), (230, 230, 230), (50, 130, 80),
            (40, 40, 45))
    return tuple(int(c) for c in hues[rng.integers(6)] + rng.integers(-20, 21, 3))


# Painters: `x, y` is the point on the ground in pixels, `u` the pixels per metre at that depth.

def paint_tree(canvas, rng, x, y, u):
    tall, wide, green = rng.uniform(4, 7) * u, rng.uniform(1.2, 1.9) * u, _leaves(rng)
    canvas.line([(x, y), (x, y - 0.6 * tall)], (70, 58, 48), TREE, 0.22 * u)
    for a, b, c in rng.random((6 if u > 3 else 2, 3)):
        cx, cy, r = x + (1.6 * a - 0.8) * wide, y - tall * (0.5 + 0.4 * b), wide * (0.5 + 0.4 * c)
        shade = tuple(int(level * (0.85 + 0.3 * b)) for level in green)
        canvas.ellipse((cx - r, cy - r, cx + r, cy + r), shade, TREE)


def paint_house(canvas, rng, x, y, u):
    half, tall, wall = rng.uniform(3, 5) * u, rng.uniform(3, 6) * u, _stone(rng)
    canvas.box((x - half, y - tall, x + half, y), wall, BUILDING)
    roof = [(x - 1.1 * half, y - tall), (x, y - tall - 0.6 * half), (x + 1.1 * half, y - tall)]
    canvas.polygon(roof, _stone(rng), BUILDING)
    for side in (-0.55, 0.55):
        left, top = x + side * half - 0.5 * u, y - 0.75 * tall
        canvas.box((left, top, left + u, top + 1.2 * u), (45, 50, 60), BUILDING)


def paint_lamp(canvas, rng, x, y, u):
    tall, arm = rng.uniform(4.5, 6.5) * u, rng.choice((-1.2, 1.2)) * u
    grey = (62, 64, 66)
    canvas.line([(x, y), (x, y - tall)], grey, POLE, 0.14 * u)
    canvas.line([(x, y - tall), (x + arm, y - tall)], grey, POLE, 0.1 * u)


def paint_sign(canvas, rng, x, y, u, round_sign):
    tall, r, colour = rng.uniform(2.4, 3.4) * u, rng.uniform(0.35, 0.55) * u, _vivid(rng)
    canvas.line([(x, y), (x, y - tall)], (62, 64, 66), POLE, 0.11 * u)
    face = (x - r, y - tall - r, x + r, y - tall + r)
    (canvas.ellipse if round_sign else canvas.box)(face, colour, SIGN)
    if r > 3:
        bar = (x - r / 2, y - tall - r / 6, x + r / 2, y - tall + r / 6)
        canvas.box(bar, (235, 235, 235), SIGN)


def paint_vehicle(canvas, rng, x, y, u, bus):
    """A car or a bus from behind; both are labelled 'car' in the scenes."""
    half, tall = (1.25, 2.9) if bus else (0.9, 1.45)
    half, tall, colour = half * u, tall * u, _vivid(rng)
    for side in (-0.7, 0.7):  # wheels
        canvas.box((x + side * half - 0.13 * u, y - 0.35 * u, x + side * half + 0.13 * u, y),
                   (25, 25, 25), CAR)
    waist = y - (0.45 if bus else 0.55) * tall
    canvas.box((x - half, waist, x + half, y - 0.15 * u), colour, CAR)
    top = 0.97 if bus else 0.72
    cabin = [(x - 0.97 * half, waist), (x - top * half, y - tall), (x + top * half, y - tall),
             (x + 0.97 * half, waist)]
    canvas.polygon(cabin, colour, CAR)
    canvas.box((x - 0.68 * half, y - 0.92 * tall, x + 0.68 * half, waist), (50, 60, 72), CAR)
    for side in (-0.85, 0.85):  # lights
        canvas.box((x + side * half - 0.1 * u, waist + 0.12 * u, x + side * half + 0.1 * u,
                    waist + 0.28 * u), (200, 60, 45), CAR)


def paint_person(canvas, rng, x, y, u):
    tall, skin = rng.uniform(1.5, 1.9) * u, (205, 165, 135)
    stride = rng.uniform(0.1, 0.3) * u
    for foot in (-stride, stride):
        canvas.line([(x, y - 0.5 * tall), (x + foot, y)], (45, 45, 60), PERSON, 0.18 * u)
    body = (x - 0.27 * u, y - 0.87 * tall, x + 0.27 * u, y - 0.4 * tall)
    canvas.ellipse(body, _vivid(rng), PERSON)
    canvas.ellipse((x - 0.14 * u, y - tall, x + 0.14 * u, y - 0.83 * tall), skin, PERSON)


def paint_bin(canvas, rng, x, y, u):
    """Something nobody labelled, as skips and bins in Cityscapes."""
    canvas.box((x - 0.5 * u, y - 1.1 * u, x + 0.5 * u, y), _vivid(rng), IGNORE)


class Street:
    """The perspective of one scene: a camera 2.2 m above a plane, looking along the street.

    `t` is nearness: 0 at the horizon, 1 at the lower border of the picture. Distance ~ 3 m / t.
    """

    def __init__(self, rng, height, width):
        self.height, self.width = height, width
        self.horizon = rng.uniform(0.36, 0.48) * height
        self.vanish = rng.uniform(0.35, 0.65) * width
        self.unit = (height - self.horizon) / 2.2  # pixels per metre at t = 1
        self.curb = rng.uniform(3.2, 4.6)          # metres from the middle of the road
        self.wall = self.curb + rng.uniform(2.0, 3.5)

    def at(self, metres, t, up=0.0):
        """Pixel of the point `metres` right of the road's middle, `up` metres high, nearness t."""
        return (self.vanish + metres * t * self.unit,
                self.horizon + t * (self.height - self.horizon) - up * t * self.unit)

    def strip(self, near, far, t0=0.0, t1=3.0):
        """Ground between two distances from the middle, as a polygon."""
        return [self.at(near, t0), self.at(far, t0), self.at(far, t1), self.at(near, t1)]


def _paint_facades(canvas, rng, street, side):
    """A row of houses along the street, far to near, with windows and now and then a poster."""
    x, t0 = side * street.wall, 0.06
    while t0 < 0.9:
        t1, tall, wall = t0 * rng.uniform(1.3, 1.8), rng.uniform(5, 15), _stone(rng)
        face = [street.at(x, t0), street.at(x, t1), street.at(x, t1, tall), street.at(x, t0, tall)]
        canvas.polygon(face, wall, BUILDING)
        columns = int(min(4, 1.2 / t0 - 1.2 / t1)) if t1 > 0.14 else 0
        glass = (48, 54, 66) if rng.random() < 0.7 else (190, 180, 130)
        # Equal steps along the street are equal steps in 1/t.
        edges = 1 / np.linspace(1 / t0, 1 / t1, 2 * columns + 2)
        for a, b in zip(edges[1:-1:2], edges[2:-1:2]):
            for floor in np.arange(1.0, min(tall, 13) - 2, 3.0):
                pane = [street.at(x, t, up) for t, up in
                        ((a, floor), (b, floor), (b, floor + 1.6), (a, floor + 1.6))]
                canvas.polygon(pane, glass, BUILDING)
        if rng.random() < 0.35:
            a, b, up = t0 + 0.3 * (t1 - t0), t0 + 0.5 * (t1 - t0), rng.uniform(2, 3.5)
            poster = [street.at(x, a, up), street.at(x, b, up), street.at(x, b, up + 1),
                      street.at(x, a, up + 1)]
            canvas.polygon(poster, _vivid(rng), BUILDING)
        t0 = t1 * (1.15 if rng.random() < 0.2 else 1.0)


def _paint_streaks(canvas, rng, street, near, far, label, colour, count):
    """Bright horizontal reflections, the same on water and on a wet road."""
    glint = tuple(min(255, c + 32) for c in colour)
    for share, t, length in rng.random((count, 3)):
        x, y = street.at(near + share * (far - near), t)
        reach = (0.4 + length) * t * street.unit
        # Cut at the strip's border, or the reflection would relabel what lies beside it.
        left, right = sorted((street.at(near, t)[0], street.at(far, t)[0]))
        canvas.line([(max(left, x - reach), y), (min(right, x + reach), y)], glint, label)


def _paint_ground(canvas, rng, street, water):
    """Skyline, both sides, road and lane marks -> the kind of each side, left and right."""
    canvas.box((0, street.horizon, street.width, street.height), _stone(rng), PAVEMENT)
    for x in np.arange(0, street.width, street.height / 10):
        painter = paint_house if rng.random() < 0.5 else paint_tree
        painter(canvas, rng, x + rng.uniform(-3, 3), street.horizon + 1,
                street.height / 128 * rng.uniform(1.0, 2.4))
    kinds = rng.choice(("street", "street", "park", "river"), 2)
    for side, kind in zip((-1, 1), kinds):
        canvas.polygon(street.strip(side * street.curb, side * 90), _stone(rng), PAVEMENT)
        border = side * (street.wall - 0.8)
        if kind == "river":
            canvas.polygon(street.strip(border, side * 900), water, WATER)
            _paint_streaks(canvas, rng, street, border, side * 30, WATER, water, 60)
        elif kind == "park":
            canvas.polygon(street.strip(border, side * 900), _leaves(rng), GRASS)
        else:
            _paint_facades(canvas, rng, street, side)
    wet = rng.random() < 0.4
    road = water if wet else _stone(rng)
    canvas.polygon(street.strip(-street.curb, street.curb), road, ROAD)
    if wet:
        _paint_streaks(canvas, rng, street, -street.curb, street.curb, ROAD, road, 30)
    marks = (215, 215, 205)
    for distance in np.arange(3.2, 40, 4):
        t0, t1 = 3 / (distance + 1.8), 3 / distance
        canvas.polygon(street.strip(-0.08, 0.08, t0, t1), marks, ROAD)
    for side in (-1, 1):
        canvas.line([street.at(side * street.curb, 0.05), street.at(side * street.curb, 3)],
                    (175, 175, 170), PAVEMENT, street.height / 128)
    return kinds


def _place_objects(rng, street, kinds):
    """-> [(t, metres, painter, extra arguments)], unsorted."""
    things = []
    for side, kind in zip((-1, 1), kinds):
        for t in 3 / (rng.uniform(3.6, 7) + np.arange(4) * rng.uniform(5, 9)):
            choice = rng.random()
            if choice < 0.75:
                sign = choice < 0.5
                extra = (bool(rng.random() < 0.5),) if sign else ()
                things.append((t, side * (street.curb + 0.5), paint_sign if sign else paint_lamp,
                               extra))
        for t in rng.uniform(0.07, 0.5, rng.integers(1, 5)):
            spread = rng.uniform(1, 9) if kind == "park" else rng.uniform(-0.7, -0.3)
            if kind != "river":
                things.append((t, side * (street.wall + spread), paint_tree, ()))
        for t in rng.uniform(0.1, 0.6, rng.integers(0, 4)):
            things.append((t, side * rng.uniform(street.curb + 0.2, street.wall), paint_person, ()))
        for t in rng.uniform(0.1, 0.4, rng.integers(0, 2)):
            things.append((t, side * (street.curb + 1.2), paint_bin, ()))
        for t in rng.uniform(0.06, 0.45, rng.integers(0, 4)):
            lane = street.curb * rng.choice((0.45, 0.78))
            things.append((t, side * lane, paint_vehicle, (bool(rng.random() < 0.2),)))
    for t in rng.uniform(0.12, 0.5, rng.integers(0, 2)):
        things.append((t, rng.uniform(-0.8, 0.8) * street.curb, paint_person, ()))
    return things


def _light_and_grain(rng, image, label, street):
    """Grain by class, a gradient of light, a colour cast, a shadow across the ground -> uint8."""
    height, width = label.shape
    fine = rng.integers(-100, 101, (height, width), np.int8) / np.float32(58)  # variance 1
    patches = Image.fromarray(rng.integers(0, 256, (16, 16 * width // height + 1), np.uint8))
    coarse = np.asarray(patches.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    grain = fine * FINE_GRAIN[label] + (coarse - 127.5) / 49 * COARSE_GRAIN[label]
    light = rng.uniform(0.65, 1.15) + rng.uniform(-0.2, 0.2) * np.linspace(-1, 1, width)
    light = np.broadcast_to(light.astype(np.float32), label.shape)  # (H, W)
    if rng.random() < 0.5:
        shadow, a, b = Image.new("L", (width, height)), *rng.uniform(-0.3, 1.3, 2) * width
        foot = [(a, street.horizon), (a + 0.1 * width, street.horizon), (b + 0.4 * width, height),
                (b, height)]
        ImageDraw.Draw(shadow).polygon(foot, fill=1)
        light = light * np.where(np.asarray(shadow), np.float32(0.62), np.float32(1))
    cast = light[..., None] * rng.uniform(0.9, 1.1, 3).astype(np.float32)
    picture = (image.astype(np.float32) + grain[..., None]) * cast
    return np.clip(picture, 0, 255).astype(np.uint8)


def draw_scene(rng, height, width):
    """One street scene -> (PIL RGB image, PIL 'L' label), both height x width."""
    street = Street(rng, height, width)
    sky = np.array([150, 175, 205]) + rng.integers(-35, 36, 3)
    water = tuple(int(c) for c in (sky * rng.uniform(0.6, 0.8)))
    canvas = Canvas(height, width, tuple(int(c) for c in sky))
    kinds = _paint_ground(canvas, rng, street, water)
    things = _place_objects(rng, street, kinds)
    for t, metres, painter, extra in sorted(things, key=lambda thing: thing[0]):  # far to near
        painter(canvas, rng, *street.at(metres, t), t * street.unit, *extra)
    if rng.random() < 0.6:  # the bonnet of the car that carries the camera
        low = height * rng.uniform(0.92, 0.97)
        canvas.ellipse((0.15 * width, low, 0.85 * width, 2 * height - low), (60, 62, 66), IGNORE)
    image = _light_and_grain(rng, np.asarray(canvas.image), np.asarray(canvas.label), street)
    return Image.fromarray(image), canvas.label


class SyntheticScenes:
    """Generated street scenes; picture i depends on (seed, split, i) and the size only."""

    num_classes, class_names, palette = 11, SCENE_CLASSES, SCENE_PALETTE

    def __init__(self, split, size=(128, 256), seed=0, length=None):
        """size: (H, W) in pixels. length: pictures, by default 400 train, 100 val, 100 test.

        Raises InputError: unknown split; a size below 32 pixels, where poles and signs vanish."""
        _require_split("synthetic", split, tuple(SPLIT_IDS))
        if min(size) < 32:
            raise InputError(f"synthetic pictures of {size[0]}x{size[1]} are too small to draw; "
                             "give a height and a width of at least 32 pixels")
        self.split, self.size, self.seed = split, tuple(size), seed
        self.length = length or (400 if split == "train" else 100)

    def __len__(self):
        return self.length

    def name(self, i):
        return f"synthetic {self.split} {i}"

    def __getitem__(self, i):
        if not 0 <= i < self.length:
            raise IndexError(i)  # ends a plain `for` over the set
        rng = np.random.default_rng((self.seed, SPLIT_IDS[self.split], i))
        return draw_scene(rng, *self.size)


# --------------------------------------------------------------------------------------------------
# Segmentation sets on disk
# --------------------------------------------------------------------------------------------------

def _require_split(dataset, split, splits):
    if split not in splits:
        raise InputError(f"data set {dataset} has no split '{split}'; choose {' or '.join(splits)}")


def _require_folder(path, flag="--data-root"):
    if not path.is_dir():
        raise InputError(f"folder {path} does not exist; give the folder that holds the data set "
                         f"as {flag} (data.py shows the tree expected below it)")
    return path


def _identity_table(num_classes):
    """256 entries: value in the file -> class, IGNORE, or -1 for a value that means nothing."""
    table = np.full(256, -1, np.int16)
    table[:num_classes] = np.arange(num_classes)
    table[IGNORE] = IGNORE
    return table


def colour_map(num_classes):
    """PASCAL VOC's colours: three bits of the class a step go to red, green, blue, high bit first.

    All colours differ up to 256 classes, so sets without an official palette use it too.
    """
    colours = []
    for k in range(num_classes):
        bits = [(k >> (3 * step), 7 - step) for step in range(8)]
        colours.append(tuple(sum((b >> c & 1) << place for b, place in bits) for c in range(3)))
    return colours


def _open(path):
    """A fully decoded PIL image. Raises InputError naming the file."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except READ_ERRORS as error:
        raise InputError(f"cannot read {path} ({error}); replace or remove the file") from None


class FilePairs:
    """Images and labels on disk, in the order given.

    table: (256,) int16, value in the label file -> class, IGNORE or -1 (illegal). The value is a
    palette picture's index, or with grey=True the brightness, which black-and-white masks need.
    dataset[i] raises InputError naming the file: unreadable, colour label, illegal value, sizes
    that differ.
    """

    def __init__(self, pairs, table, class_names, palette, grey=False):
        self.images, self.labels = [i for i, _ in pairs], [l for _, l in pairs]
        for image, label in pairs:
            if not Path(label).is_file():
                raise InputError(f"image {image} has no label: {label} does not exist; "
                                 "add the label or remove the image")
        self.table, self.class_names, self.palette = table, tuple(class_names), palette
        self.num_classes, self.grey = len(self.class_names), grey

    def __len__(self):
        return len(self.images)

    def name(self, i):
        return Path(self.images[i]).name

    def read_label(self, i):
        """-> (H, W) uint8, classes and IGNORE."""
        return self._read(self.labels[i])

    def _read(self, path):
        label = _open(path)
        if label.mode not in ("L", "P", "1"):
            fault = ("a colour picture" if label.mode.startswith(("RGB", "CMYK", "YCbCr"))
                     else f"a picture of mode {label.mode}")
            wanted = "a grey mask is" if self.grey else "class indices are"
            raise InputError(f"label {path} is {fault}; {wanted} expected (8-bit PNG, "
                             "grey or palette)")
        # Of a palette picture numpy reads the indices; convert("L") takes its brightness.
        raw = np.asarray(label.convert("L") if self.grey else label, np.uint8)
        mapped = self.table[raw]
        if mapped.min() < 0:
            raise InputError(f"label {path} holds the value {raw[mapped < 0].max()}, which is "
                             f"neither one of the {self.num_classes} classes nor ignore "
                             f"({IGNORE}); correct the label or the number of classes")
        return mapped.astype(np.uint8)

    def require_same_size(self, i, image_size, label):
        """image_size: PIL's (W, H); label: (H, W) array."""
        if image_size != label.shape[::-1]:
            raise InputError(f"image {self.images[i]} is {image_size[0]}x{image_size[1]} but its "
                             f"label {self.labels[i]} is {label.shape[1]}x{label.shape[0]}; "
                             "make them the same size")

    def __getitem__(self, i):
        image, label = _open(self.images[i]), self.read_label(i)
        self.require_same_size(i, image.size, label)
        return image.convert("RGB"), Image.fromarray(label)


def _match(image_dir, label_dir, label_suffix=".png"):
    """Pairs by stem: image_dir/a.jpg with label_dir/a + label_suffix; sorted by name."""
    _require_folder(image_dir), _require_folder(label_dir)
    images = sorted(p for p in image_dir.iterdir()
                    if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not images:
        raise InputError(f"folder {image_dir} holds no image ({', '.join(IMAGE_SUFFIXES)}); "
                         "check --data-root")
    return [(image, label_dir / (image.stem + label_suffix)) for image in images]


def camvid(root, split):
    """CamVid, 11 classes and void, in the usual folders (367 / 101 / 233 images of 480x360).

        root/train  root/trainannot     0001TP_006690.jpg (or .png)   0001TP_006690.png
        root/val    root/valannot       label value k = class k, 11 = void
        root/test   root/testannot
    """
    _require_split("camvid", split, ("train", "val", "test"))
    names = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car",
             "pedestrian", "bicyclist")
    palette = [(128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222),
               (128, 128, 0), (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0),
               (0, 128, 192)]
    table = _identity_table(11)
    table[11] = IGNORE
    return FilePairs(_match(root / split, root / f"{split}annot"), table, names, palette)


def cityscapes(root, split):
    """Cityscapes fine annotations, 19 classes. The test labels are not public: use val.

        root/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png
        root/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png
    """
    if split == "test":
        raise InputError("the labels of Cityscapes' test split are not public; use split val")
    _require_split("cityscapes", split, ("train", "val"))
    for part in ("leftImg8bit", "gtFine"):
        _require_folder(root / part / split)
    try:
        found = torchvision.datasets.Cityscapes(str(root), split=split, mode="fine",
                                                target_type="semantic")
    except (OSError, RuntimeError) as error:  # a stray file among the cities, for instance
        raise InputError(f"{root} is not the Cityscapes tree expected ({error})") from None
    if not found.images:
        raise InputError(f"folder {root / 'leftImg8bit' / split} holds no image; check --data-root")
    table = _identity_table(0)
    for entry in found.classes[:-1]:  # the last entry, license plate, has id -1: never in a file
        table[entry.id] = entry.train_id
    # Sorted because torchvision lists folders in the order of the file system.
    pairs = sorted((image, label) for image, (label,) in zip(found.images, found.targets))
    return FilePairs(pairs, table, *_cityscapes_classes())


def _cityscapes_classes():
    """-> names and colours of the 19 train ids, which BDD100K shares."""
    kept = sorted((c.train_id, c.name, c.color) for c in torchvision.datasets.Cityscapes.classes
                  if 0 <= c.train_id < IGNORE)
    return [name for _, name, _ in kept], [colour for _, _, colour in kept]


def voc(root, split):
    """PASCAL VOC 2012, 21 classes with background, 255 = ignore.

        root/VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg
                              /SegmentationClass/2007_000032.png
                              /ImageSets/Segmentation/{train,val,trainval}.txt
    SBD's extra labels (10,582 training images) are taken for split train where both are there;
    split trainvoc is VOC's own train list all the same:
                              /SegmentationClassAug/2007_000032.png
                              /ImageSets/Segmentation/trainaug.txt
    """
    _require_split("voc", split, ("train", "trainvoc", "trainval", "val"))
    base = _require_folder(root / "VOCdevkit" / "VOC2012")
    extra, listing = base / "SegmentationClassAug", base / "ImageSets/Segmentation/trainaug.txt"
    if split == "train" and extra.is_dir() and listing.is_file():
        # Lists in circulation hold bare stems or "/JPEGImages/x.jpg /SegmentationClassAug/x.png".
        stems = [Path(line.split()[0]).stem for line in listing.read_text().splitlines() if line]
        pairs = [(base / "JPEGImages" / f"{s}.jpg", extra / f"{s}.png") for s in stems]
    else:
        try:
            found = torchvision.datasets.VOCSegmentation(
                str(root), "2012", split.replace("trainvoc", "train"), download=False)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{base} is not the VOC tree expected ({error})") from None
        pairs = list(zip(found.images, found.targets))
    if not pairs:
        raise InputError(f"the list of split {split} under {base} names no image; "
                         "check --data-root")
    names = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog "
             "horse motorbike person pottedplant sheep sofa train tvmonitor").split()
    return FilePairs(pairs, _identity_table(21), names, colour_map(21))


def ade20k(root, split):
    """ADE20K scene parsing, 150 classes; in the files 0 = unlabelled and k = class k - 1.

        root/images/{training,validation}/ADE_train_00000001.jpg
        root/annotations/{training,validation}/ADE_train_00000001.png
        root/objectInfo150.txt           names the classes, where it is there
    root may also be the folder that holds ADEChallengeData2016.
    """
    _require_split("ade20k", split, ("train", "val"))
    if (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    folder_name = {"train": "training", "val": "validation"}[split]
    pairs = _match(root / "images" / folder_name, root / "annotations" / folder_name)
    table = _identity_table(0)
    table[0], table[1:151] = IGNORE, np.arange(150)
    names, info = [f"class {k}" for k in range(150)], root / "objectInfo150.txt"
    if info.is_file():  # a header line, then: index, share, train, val, names
        rows = [line.split("\t") for line in info.read_text().splitlines()[1:] if line]
        names = [row[-1].split(",")[0].strip() for row in rows]
    if len(names) != 150:
        raise InputError(f"{info} lists {len(names)} classes and not 150; replace or remove it")
    return FilePairs(pairs, table, names, colour_map(150))


def bdd100k(root, split):
    """BDD100K semantic segmentation (the 10k images), Cityscapes' 19 train ids, 255 = ignore.

        root/images/10k/{train,val}/0004a4c0.jpg
        root/labels/sem_seg/masks/{train,val}/0004a4c0.png
    or the older release:
        root/seg/images/{train,val}/0004a4c0.jpg
        root/seg/labels/{train,val}/0004a4c0_train_id.png
    """
    _require_split("bdd100k", split, ("train", "val"))
    if (root / "seg").is_dir():
        pairs = _match(root / "seg/images" / split, root / "seg/labels" / split, "_train_id.png")
    else:
        pairs = _match(root / "images/10k" / split, root / "labels/sem_seg/masks" / split)
    return FilePairs(pairs, _identity_table(19), *_cityscapes_classes())


def folder(root, split, num_classes):
    """Your own images. Labels are 8-bit PNG holding class indices, grey or palette; 255 = ignore.

        root/train/images/a.jpg (or .png)    root/train/labels/a.png
        root/val/images/b.jpg                root/val/labels/b.png
    """
    _require_split("folder", split, ("train", "val", "test"))
    if num_classes is None or not 2 <= num_classes <= 254:
        raise InputError("data set folder needs the number of classes (2 to 254); "
                         "give --num-classes")
    pairs = _match(root / split / "images", root / split / "labels")
    names = [f"class {k}" for k in range(num_classes)]
    return FilePairs(pairs, _identity_table(num_classes), names, colour_map(num_classes))


SEGMENTATION_SETS = ("synthetic", "camvid", "cityscapes", "voc", "ade20k", "bdd100k", "folder")


def _require_root(name, root, flag="--data-root"):
    if root is None:
        raise InputError(f"data set {name} lies on disk: give its folder as {flag}")
    return _require_folder(Path(root), flag)


def open_segmentation(name, root=None, split="train", num_classes=None, size=(128, 256), seed=0):
    """-> raw set: dataset[i], len, name(i), num_classes, class_names, palette.

    size (H, W) and seed matter for `synthetic` only, num_classes is required by `folder` only.
    Raises InputError: unknown set or split, missing folder, no image, image without label, a
    num_classes that contradicts the set.
    """
    if name not in SEGMENTATION_SETS:
        raise InputError(f"unknown data set '{name}'; choose {', '.join(SEGMENTATION_SETS)}")
    if name == "synthetic":
        dataset = SyntheticScenes(split, size, seed)
    elif name == "folder":
        dataset = folder(_require_root(name, root), split, num_classes)
    else:
        opener = {"camvid": camvid, "cityscapes": cityscapes, "voc": voc, "ade20k": ade20k,
                  "bdd100k": bdd100k}[name]
        dataset = opener(_require_root(name, root), split)
    return _require_classes(name, dataset, num_classes)


def _require_classes(name, dataset, num_classes):
    if num_classes not in (None, dataset.num_classes):
        raise InputError(f"data set {name} has {dataset.num_classes} classes, not {num_classes}; "
                         "leave --num-classes out")
    return dataset


def _ends_whole(path):
    """Whether a PNG or JPEG still has its end mark: far cheaper than decoding the picture."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - 16))
        tail = file.read()
    return b"IEND" in tail or tail.rstrip(b"\0").endswith(b"\xff\xd9")


def check_segmentation(dataset, limit=None):
    """Open every pair, or `limit` evenly spaced ones, before hours of training -> pairs checked.

    Labels are decoded. Of an image only the header and the end mark are read, and the whole only
    where the mark is missing; damage in its middle surfaces when training reads it. Raises
    InputError naming the file: unreadable or cut short, colour label, illegal value, sizes differ.
    """
    if not isinstance(dataset, FilePairs):
        return 0  # generated pictures cannot be damaged
    count = len(dataset) if limit is None else min(limit, len(dataset))
    for i in np.linspace(0, len(dataset) - 1, count).round().astype(int):
        path = dataset.images[i]
        try:
            with Image.open(path) as image:
                size = image.size
        except READ_ERRORS as error:
            raise InputError(f"cannot read {path} ({error}); replace or remove the file") from None
        if not _ends_whole(path):
            _open(path)
        dataset.require_same_size(i, size, dataset.read_label(i))
    return count


# --------------------------------------------------------------------------------------------------
# Classification sets
# --------------------------------------------------------------------------------------------------

OBJECTS = (("tree", paint_tree, (), 6.5), ("house", paint_house, (), 9),
           ("lamp", paint_lamp, (), 6), ("round sign", paint_sign, (True,), 3.4),
           ("square sign", paint_sign, (False,), 3.4), ("car", paint_vehicle, (False,), 2.2),
           ("bus", paint_vehicle, (True,), 3.4),
           ("person", paint_person, (), 2))  # name, painter, its arguments, metres in the picture


class SyntheticObjects:
    """One centred object of the street scenes a picture; class and picture depend on (seed, split,
    i). dataset[i] -> (PIL RGB image, int)."""

    num_classes, class_names = len(OBJECTS), tuple(entry[0] for entry in OBJECTS)

    def __init__(self, split, size=(64, 64), seed=0, length=None):
        """size: (H, W) in pixels. length: pictures, by default 800 train, 200 val, 200 test."""
        _require_split("synthetic", split, tuple(SPLIT_IDS))
        self.split, self.size, self.seed = split, tuple(size), seed
        self.length = length or (800 if split == "train" else 200)

    def __len__(self):
        return self.length

    def draw(self, i):
        """-> (PIL RGB image, PIL 'L' label as in the scenes, class of the object)."""
        if not 0 <= i < self.length:
            raise IndexError(i)
        # The 3 sets these pictures apart from the street scenes of the same seed, split and index.
        rng = np.random.default_rng((self.seed, SPLIT_IDS[self.split], i, 3))
        height, width = self.size
        street = Street(rng, height, width)
        canvas = Canvas(height, width, _stone(rng))
        ground = _leaves(rng) if rng.random() < 0.5 else _stone(rng)
        canvas.box((0, street.horizon, width, height), ground, GRASS)
        kind = i % len(OBJECTS)  # balanced
        _, painter, extra, metres = OBJECTS[kind]
        u = min(self.size) / metres * rng.uniform(0.7, 0.9)
        foot = width * rng.uniform(0.4, 0.6), height * rng.uniform(0.88, 0.96)
        painter(canvas, rng, *foot, u, *extra)
        image = _light_and_grain(rng, np.asarray(canvas.image), np.asarray(canvas.label), street)
        return Image.fromarray(image), canvas.label, kind

    def __getitem__(self, i):
        image, _, kind = self.draw(i)
        return image, kind


class ImageFolders:
    """root/{train,val}/<class name>/*.jpg or png; dataset[i] -> (PIL RGB image, int)."""

    def __init__(self, root, split):
        _require_split("imagefolder", split, ("train", "val"))
        try:
            found = torchvision.datasets.ImageFolder(_require_folder(root / split, "--cls-root"))
            training = torchvision.datasets.folder.find_classes(
                _require_folder(root / "train", "--cls-root"))[0]
        except FileNotFoundError as error:
            raise InputError(f"{root} is not a tree of class folders ({error})") from None
        if found.classes != training:
            odd = sorted(set(found.classes) ^ set(training))[0]
            raise InputError(f"class folder '{odd}' is in only one of {root}/train and "
                             f"{root}/{split}; both need the same classes")
        self.samples, self.class_names = found.samples, tuple(found.classes)
        self.num_classes = len(self.class_names)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        path, kind = self.samples[i]
        return _open(path).convert("RGB"), kind


def open_classification(name, root=None, split="train", size=(64, 64), seed=0):
    """-> dataset[i] = (PIL RGB image, int), len, num_classes, class_names.

    name: `synthetic` (eight generated objects; size (H, W) and seed matter) or `imagefolder`.
    Raises InputError as open_segmentation does.
    """
    if name == "synthetic":
        return SyntheticObjects(split, size, seed)
    if name == "imagefolder":
        return ImageFolders(_require_root(name, root, "--cls-root"), split)
    raise InputError(f"unknown classification set '{name}'; choose synthetic or imagefolder")


# --------------------------------------------------------------------------------------------------
# Saliency and edges: two classes, the second is what is looked for
# --------------------------------------------------------------------------------------------------

BLACK_WHITE = [(0, 0, 0), (255, 255, 255)]


class SyntheticSaliency(SyntheticObjects):
    """The object pictures; salient is every pixel of the one object in the middle."""

    num_classes, class_names, palette = 2, ("background", "salient"), BLACK_WHITE

    def name(self, i):
        return f"synthetic {self.split} {i}"

    def __getitem__(self, i):
        image, label, _ = self.draw(i)
        return image, Image.fromarray((~np.isin(label, (SKY, GRASS))).astype(np.uint8))


def saliency(root, split):
    """Saliency pairs as MSRA-B has them: 8-bit grey masks, at least 128 = salient.

        root/train/images/a.jpg (or .png)    root/train/masks/a.png
        root/val/images/b.jpg                root/val/masks/b.png
        root/test/images/c.jpg               root/test/masks/c.png
    """
    _require_split("msra_b", split, ("train", "val", "test"))
    pairs = _match(root / split / "images", root / split / "masks")
    table = (np.arange(256) >= 128).astype(np.int16)  # distributed as JPEG: not only 0 and 255
    return FilePairs(pairs, table, ("background", "salient"), BLACK_WHITE, grey=True)


def consensus(annotations):
    """Several annotators' edges, (H, W) bool each -> (H, W) uint8: 1 edge, 0 none, or IGNORE.

    HED [Xie & Tu, ICCV 2015] takes for an edge what three of BSDS's usually five annotators marked,
    all else for none. OURS: half of them, rounded up, are enough where that is less than three, or
    pictures with few annotators had no edge; and what fewer marked is neither: it is ignored.
    """
    votes = np.sum(annotations, 0)
    needed = min(3, (len(annotations) + 1) // 2)
    return np.where(votes >= needed, 1, np.where(votes > 0, IGNORE, 0)).astype(np.uint8)


class SyntheticEdges(SyntheticScenes):
    """Street scenes with the borders between classes, as four to six annotators might draw them.

    An annotator overlooks one class in ten, and two in five draw everything one pixel beside.
    """

    num_classes, class_names, palette = 2, ("none", "edge"), BLACK_WHITE

    def annotations(self, i):
        """-> list of (H, W) bool arrays, one an annotator."""
        return self._annotate(i, super().__getitem__(i)[1])

    def _annotate(self, i, label):
        rng = np.random.default_rng((self.seed, SPLIT_IDS[self.split], i, 5))
        # Ends padded with themselves, so that every pixel has a right and a lower neighbour.
        label = np.pad(np.asarray(label), ((0, 1), (0, 1)), mode="edge")
        here, found = label[:-1, :-1], []
        for _ in range(rng.integers(4, 7)):
            seen = rng.random(256) >= 0.1
            edge = np.zeros(here.shape, bool)
            for other in (label[:-1, 1:], label[1:, :-1]):
                edge |= (here != other) & seen[here] & seen[other]
            shift = rng.integers(-1, 2, 2) * (rng.random() < 0.4)
            moved = np.pad(edge, 1)[1 + shift[0]:, 1 + shift[1]:]
            found.append(moved[:here.shape[0], :here.shape[1]])
        return found

    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        return image, Image.fromarray(consensus(self._annotate(i, label)))


class EdgePairs(FilePairs):
    """Images and the edge maps of several annotators; dataset[i][1] is their consensus."""

    def __init__(self, images, annotations):
        """annotations: one list of paths an image, none of them empty."""
        table = np.minimum(np.arange(256), 1).astype(np.int16)
        super().__init__([(image, paths[0]) for image, paths in zip(images, annotations)], table,
                         ("none", "edge"), BLACK_WHITE, grey=True)
        self.paths = annotations

    def annotations(self, i):
        """-> list of (H, W) bool arrays, one an annotator."""
        found = [self._read(path) > 0 for path in self.paths[i]]
        for path, edge in zip(self.paths[i], found):
            if edge.shape != found[0].shape:
                raise InputError(f"annotation {path} is {edge.shape[1]}x{edge.shape[0]} but "
                                 f"{self.paths[i][0]} is {found[0].shape[1]}x{found[0].shape[0]}; "
                                 "make them the same size")
        return found

    def read_label(self, i):
        return consensus(self.annotations(i))


def edges(root, split):
    """Edges with any number of annotators a picture, as in BSDS500 (200 / 100 / 200 images).

        root/train/12003.jpg (or .png)    root/train_edges/12003_0.png, 12003_1.png, ...
        root/val/3096.jpg                 root/val_edges/3096_0.png, ...
        root/test/2018.jpg                root/test_edges/2018_0.png, ...
    One file an annotator, not zero = edge. Split trainval is train and val together: PAPER
    SparseMask §5.3 trains on it.
    """
    _require_split("bsds500", split, ("train", "val", "trainval", "test"))
    images, annotations = [], []
    for part in ("train", "val") if split == "trainval" else (split,):
        pairs, by_image = _match(root / part, root / f"{part}_edges", "_0.png"), {}
        for path in (root / f"{part}_edges").glob("*_*.png"):
            stem, _, number = path.stem.rpartition("_")
            if number.isdecimal():
                by_image.setdefault(stem, []).append((int(number), path))
        images += [image for image, _ in pairs]
        # Where there is none, the name expected, which FilePairs then finds missing.
        annotations += [[path for _, path in sorted(by_image.get(image.stem, [(0, expected)]))]
                        for image, expected in pairs]
    return EdgePairs(images, annotations)


TASK_SETS = {"segmentation": SEGMENTATION_SETS, "saliency": ("synthetic", "msra_b"),
             "edges": ("synthetic", "bsds500")}


def open_task(task, name, root=None, split="train", num_classes=None, size=(128, 256), seed=0):
    """open_segmentation for any dense task: `segmentation`, `saliency` or `edges`.

    The two others always have 2 classes; sets of edges also have annotations(i), a list of (H, W)
    bool arrays. Raises InputError as open_segmentation does, and on an unknown task.
    """
    if task not in TASK_SETS:
        raise InputError(f"unknown task '{task}'; choose {', '.join(TASK_SETS)}")
    if name not in TASK_SETS[task]:
        raise InputError(f"task {task} has no data set '{name}'; choose "
                         f"{', '.join(TASK_SETS[task])}")
    if task == "segmentation":
        return open_segmentation(name, root, split, num_classes, size, seed)
    generated, on_disk = {"saliency": (SyntheticSaliency, saliency),
                          "edges": (SyntheticEdges, edges)}[task]
    dataset = (generated(split, size, seed) if name == "synthetic" else
               on_disk(_require_root(name, root), split))
    return _require_classes(name, dataset, num_classes)


# --------------------------------------------------------------------------------------------------
# Augmentation
# --------------------------------------------------------------------------------------------------

class Rescale(v2.Transform):
    """Multiply the size by a factor drawn uniformly from `scales`: image bilinear with antialias,
    label nearest, or left alone where `label` is False.

    NEAREST_EXACT and not v2's default for masks: the default takes each target pixel's upper left
    corner and would shift the label by up to half a pixel against the image.
    """

    def __init__(self, scales, label=True):
        super().__init__()
        self.scales, self.label = scales, label

    def make_params(self, flat_inputs):
        factor = torch.empty(1).uniform_(*self.scales).item()
        return {"size": [max(1, round(side * factor)) for side in flat_inputs[0].shape[-2:]]}

    def transform(self, inpt, params):
        if not isinstance(inpt, tv_tensors.Mask):
            return v2.functional.resize(inpt, params["size"], antialias=True)
        plane, nearest = inpt.as_subclass(torch.Tensor)[None], v2.InterpolationMode.NEAREST_EXACT
        resized = v2.functional.resize(plane, params["size"], nearest)[0] if self.label else inpt
        return tv_tensors.Mask(resized)


def _normalize():
    return [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(MEAN, STD)]


def train_transform(size, scales=(0.5, 2.0), base_scale=1.0):
    """Random scale, crop, flip for segmentation -> callable on (tv_tensors.Image, Mask).

    size: crop (H, W) in pixels, of what is left after base_scale (0.5: half-resolution
    Cityscapes). scales: smallest and largest factor, drawn uniformly. Where the picture is smaller
    than the crop it is padded with the mean colour (0 once normalised) and IGNORE, on both sides,
    so that the picture lands anywhere in the crop.
    """
    fill = {tv_tensors.Image: [round(255 * m) for m in MEAN], tv_tensors.Mask: IGNORE}
    return v2.Compose([Rescale((scales[0] * base_scale, scales[1] * base_scale)),
                       v2.RandomCrop(size, pad_if_needed=True, fill=fill),
                       v2.RandomHorizontalFlip(), *_normalize()])


class TurnEdges(v2.Transform):
    """Scale by 1/2, 1 or 3/2 and turn by a multiple of 22.5 degrees, image and edge label.

    Nearest interpolation would break lines one pixel wide. So when the label shrinks, each edge
    pixel marks the target pixel it falls into: a maximum over the pixels below, none is lost and a
    line stays one pixel wide. And the label is turned by bilinear interpolation cut at 1/4: samples
    within half a pixel of a line, straight or diagonal, are above that, so it stays connected.
    """

    def make_params(self, flat_inputs):
        factor, step = (0.5, 1.0, 1.5)[int(torch.randint(3, ()))], int(torch.randint(16, ()))
        size = [max(1, round(side * factor)) for side in flat_inputs[0].shape[-2:]]
        # Quarter turns move pixels and interpolate nothing; 0 to 67.5 degrees are left.
        return {"size": size, "quarters": step // 4, "angle": step % 4 * 22.5}

    def transform(self, inpt, params):
        bilinear, plane = v2.InterpolationMode.BILINEAR, inpt.as_subclass(torch.Tensor)
        turn = lambda p, fill: (v2.functional.rotate(p, params["angle"], bilinear, fill=fill)
                                if params["angle"] else p)
        if not isinstance(inpt, tv_tensors.Mask):
            plane = v2.functional.resize(plane, params["size"], antialias=True)
            plane = torch.rot90(plane, params["quarters"], (-2, -1))
            return tv_tensors.Image(turn(plane, [round(255 * m) for m in MEAN]))
        plane = torch.rot90(_resize_edges(plane, *params["size"]), params["quarters"])
        edge, ignore = turn(torch.stack([plane == 1, plane == IGNORE]).float(), [0.0, 1.0]) >= 0.25
        return tv_tensors.Mask(torch.where(edge, 1, torch.where(ignore, IGNORE, 0)).to(plane.dtype))


def _resize_edges(label, height, width):
    """(H, W) -> (height, width), an edge going before IGNORE and IGNORE before none."""
    old_height, old_width = label.shape
    if height >= old_height:
        nearest = v2.InterpolationMode.NEAREST_EXACT  # enlarged, every pixel is hit
        return v2.functional.resize(label[None], [height, width], nearest)[0]
    out = torch.zeros(height, width, dtype=label.dtype)
    for value in (IGNORE, 1):
        y, x = (2 * index + 1 for index in (label == value).nonzero(as_tuple=True))
        out[y * height // (2 * old_height), x * width // (2 * old_width)] = value
    return out


def edge_transform(size):
    """HED's augmentation for edges -> callable on (tv_tensors.Image, Mask); size: crop (H, W).

    PAPER: SparseMask §5.3 augments as HED does: 3 scales, 16 angles, flip. HED then cuts the
    largest upright rectangle out of the turned picture; OURS: the picture keeps its canvas and what
    the turn brings in is IGNORE (mean colour in the image), as is the padding up to the crop, so
    that a batch has one size.
    """
    fill = {tv_tensors.Image: [round(255 * m) for m in MEAN], tv_tensors.Mask: IGNORE}
    return v2.Compose([TurnEdges(), v2.RandomCrop(size, pad_if_needed=True, fill=fill),
                       v2.RandomHorizontalFlip(), *_normalize()])


def eval_transform(base_scale=1.0):
    """The whole image times base_scale, normalised; the label untouched, as mIoU is measured at
    the label's own resolution. -> callable on (tv_tensors.Image, Mask)."""
    resize = [] if base_scale == 1 else [Rescale((base_scale, base_scale), label=False)]
    return v2.Compose([*resize, *_normalize()])


def classification_transform(size, train):
    """Random resized crop and flip, or shorter side and centre crop; size (H, W) in pixels.

    OURS: no margin around the centre crop at evaluation, as small pictures have none to spare."""
    steps = ([v2.RandomResizedCrop(size, scale=(0.4, 1.0), antialias=True),
              v2.RandomHorizontalFlip()] if train else
             [v2.Resize(max(size), antialias=True), v2.CenterCrop(size)])
    return v2.Compose([*steps, *_normalize()])


# --------------------------------------------------------------------------------------------------
# Samples and batches
# --------------------------------------------------------------------------------------------------

def _mix(*numbers):
    """One 63-bit seed out of several non-negative integers, without the collisions of a sum."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


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
            # torch.manual_seed would reseed the GPUs too, which fork_rng does not put back here.
            torch.default_generator.manual_seed(_mix(self.seed, epoch, i))
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
        share = len(self.indices) + (self.world_size - 1 if self.shuffle else
                                     self.world_size - 1 - self.rank)
        return share // self.world_size

    def __iter__(self):
        order = np.array(self.indices)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
            order = np.resize(order, len(self) * self.world_size)  # repeats from the start
        for i in order[self.rank::self.world_size]:
            yield self.epoch, int(i)


def make_loader(dataset, indices, transform, batch_size, shuffle, workers=0, seed=0, rank=0,
                world_size=1, drop_last=None):
    """A DataLoader over dataset[i] for i in indices (None: all); loader.sampler.set_epoch(e).

    batch_size counts the pictures of one rank. drop_last defaults to shuffle, except where it
    would leave no batch at all. Sets with pictures of several sizes need batch_size 1 at
    evaluation, where nothing crops them.
    """
    indices = range(len(dataset)) if indices is None else indices
    sampler = EpochSampler(indices, shuffle, seed, rank, world_size)
    drop_last = (shuffle if drop_last is None else drop_last) and len(sampler) >= batch_size
    return torch.utils.data.DataLoader(
        Samples(dataset, transform, seed), batch_size, sampler=sampler, num_workers=workers,
        drop_last=drop_last, pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0,
        generator=torch.Generator())  # its own: else each epoch draws from the global generator


def split_indices(n, parts, seed=0):
    """Disjoint random parts of range(n) -> one sorted list per part; sizes sum to n.

    parts: shares, e.g. (0.4, 0.4, 0.2) for weights, architecture and held-out; only their ratios
    count. Raises InputError when a part would be empty.
    """
    bounds = np.round(np.cumsum(parts) / np.sum(parts) * n).astype(int)[:-1]
    order = np.random.default_rng((seed, n)).permutation(n)
    chunks = [sorted(chunk.tolist()) for chunk in np.split(order, bounds)]
    if not all(chunks):
        raise InputError(f"{n} images are too few to split into {len(parts)} parts of shares "
                         f"{tuple(parts)}; use more images")
    return chunks
