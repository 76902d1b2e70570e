"""The method in one picture: black is the model, grey is gone after training."""

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

SKY, HILL, HOUSE = COLORS = "#56b4e9", "#009e73", "#e69f00"
INK, GREY, PALE = "#111111", "#686868", "#f3f3f3"

figure = Figure((10, 4.9))
axes = figure.add_axes((0, 0, 1, 1))
axes.set(xlim=(0, 100), ylim=(0, 49), aspect="equal")
axes.axis("off")


def write(x, y, text, color=INK, **style):
    """Write a line or two, centred if nothing else is said."""
    style = {"ha": "center", "va": "center", "linespacing": 1.35} | style
    axes.text(x, y, text, color=color, fontsize=10.5, **style)


def arrow(start, end, color=INK, style="-|>", mutation_scale=13):
    """Draw an arrow that touches both points."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle=style,
            color=color,
            mutation_scale=mutation_scale,
            lw=1.5,
            shrinkA=0,
            shrinkB=0,
        )
    )


def mix(color, other, share):
    """Blend two colours; ``share`` is that of the second."""
    return tuple(
        (1 - share) * a + share * b for a, b in zip(to_rgb(color), to_rgb(other), strict=True)
    )


def scene(x, y, width, height, colors, edge=INK):
    """Draw a house on a hill, in three flat colours, those of sky, hill and house."""
    sky, hill, house = colors
    frame = Rectangle((x, y), width, height, facecolor=sky, edgecolor=edge, lw=1.2)
    axes.add_patch(frame)
    parts = [
        (house, [(0.3, 0.25), (0.3, 0.56), (0.47, 0.78), (0.64, 0.56), (0.64, 0.25)]),
        (hill, [(0, 0), (0, 0.3), (0.25, 0.42), (0.6, 0.3), (1, 0.48), (1, 0)]),
    ]
    for color, corners in parts:
        points = [(x + width * u, y + height * v) for u, v in corners]
        patch = Polygon(points, facecolor=color, edgecolor="none")
        axes.add_patch(patch)
        patch.set_clip_path(frame)
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=edge, lw=1.2))


# The model: what is there at inference.
title = {"weight": "bold", "va": "baseline"}
LEFT, TOP, WIDTH, HEIGHT = 2, 30.5, 17, 12.5
scene(LEFT, TOP, WIDTH, HEIGHT, ("#cfe3ee", "#8fb39a", "#c9a58b"))
photo = [(0.41, 0.3, 0.06, 0.16, "#7c5c48"), (0.52, 0.4, 0.07, 0.1, "#f7f0d8")]
for u, v, w, h, color in photo:
    place = (LEFT + WIDTH * u, TOP + HEIGHT * v)
    axes.add_patch(Rectangle(place, WIDTH * w, HEIGHT * h, color=color, lw=0))
axes.add_patch(Circle((LEFT + 14, TOP + 10), 1.3, color="#fbf3c8", lw=0))
write(LEFT + WIDTH / 2, 45, "image", **title)

arrow((20, 36.5), (32.5, 36.5))
write(26, 38.6, "encoder,")
write(26, 34.3, "decoder")

# Features: a stack of maps, coarse cells in the colours of what they show.
LABELS = ["sssss", "sshss", "shhhs", "gghhg", "ggggg"]
SHADES = {"s": SKY, "g": HILL, "h": HOUSE}
for depth in (2, 1, 0):
    left, bottom = 34 + 1.1 * depth, 30.0 + 0.9 * depth
    for row, line in enumerate(reversed(LABELS)):
        for column, letter in enumerate(line):
            pale = 0.25 + 0.11 * ((3 * row + 5 * column + 7 * depth) % 5)
            axes.add_patch(
                Rectangle(
                    (left + 2.9 * column, bottom + 2.3 * row),
                    2.9,
                    2.3,
                    facecolor=mix(SHADES[letter], "white", pale),
                    edgecolor="white",
                    lw=0.5,
                )
            )
    axes.add_patch(Rectangle((left, bottom), 14.5, 11.5, fill=False, edgecolor=INK, lw=1.2))
write(42.4, 45, "features", **title)

arrow((51.5, 36.5), (60, 36.5))
axes.add_patch(
    Polygon(
        [(60.5, 29.5), (60.5, 43.5), (70.5, 40), (70.5, 33)],
        facecolor="white",
        edgecolor=INK,
        lw=1.6,
    )
)
write(65.5, 36.5, r"$1 \times 1$")
write(65.5, 45, "classifier", **title)
arrow((71, 36.5), (80, 36.5))
scene(81, TOP, WIDTH, HEIGHT, COLORS)
write(89.5, 45, "prediction", **title)

# The regularizer: what training adds.
axes.add_patch(
    FancyBboxPatch(
        (1.2, 1),
        97.6,
        23.6,
        boxstyle="round,pad=0,rounding_size=1.4",
        facecolor=PALE,
        edgecolor="none",
    )
)
write(3.2, 3.2, "grey: gone at inference", GREY, ha="left", style="italic")

scene(3.2, 9.5, 11.9, 8.75, [mix(color, PALE, 0.25) for color in COLORS], GREY)
write(9.2, 19.4, "labels", GREY, **title)


def mean(x, y, color, shade):
    """Draw the mean of one class and group."""
    axes.add_patch(Circle((x, y), 1.15, facecolor=mix(color, "white", shade), ec=GREY, lw=1.1))


def centroid(x, y, color, shade):
    """Draw the centroid of one class and group."""
    points = [(x - 1.45, y), (x, y + 1.45), (x + 1.45, y), (x, y - 1.45)]
    axes.add_patch(Polygon(points, facecolor=mix(color, "white", shade / 4), ec=GREY, lw=1.1))


MEANS, CENTROIDS, BOTTOM = (35.9, 39.1, 42.3, 45.5), (59, 62.2, 68.8, 72), (9.2, 12.9, 16.6)
for columns, draw in ((MEANS, mean), (CENTROIDS, centroid)):
    for row, (y, color) in enumerate(zip(BOTTOM, (HOUSE, HILL, SKY), strict=True)):
        for group, x in enumerate(columns):
            draw(x, y, color, 0.1 + 0.12 * ((2 * row + 3 * group) % 5))
for y in BOTTOM:
    arrow((63.5, y), (65.6, y), GREY, mutation_scale=9)
    arrow((67.5, y), (65.4, y), GREY, mutation_scale=9)

arrow((16, 12.9), (33.6, 12.9), GREY)
arrow((40.7, 29.3), (40.7, 18.8), GREY)
arrow((48, 12.9), (56.5, 12.9), GREY, "<|-|>")
arrow((65.5, 18.8), (65.5, 30.6), GREY)
arrow((89.5, 29.3), (89.5, 18.8), GREY)

# What each step is called, and the sum that is minimised.
write(39.7, 22, "Eq. 1", GREY, ha="right")
write(52.3, 15, "Eq. 2", GREY)
write(52.3, 10.7, "align", GREY, weight="bold")
write(77.6, 14.3, "Eq. 3", GREY)
write(77.6, 11.5, "pull", GREY, weight="bold")
write(64.5, 22, "Eq. 4, $L_v$", GREY, ha="right")
write(66.6, 22, "classify", GREY, ha="left", weight="bold")
write(40.7, 4.6, "means of each class\nin random groups", GREY)
write(65.5, 5.6, "learnable centroids", GREY)
write(89.5, 15.9, "your loss", GREY, va="baseline")
for y, weight, name in ((12.2, "0.1", "align"), (8.5, "1.0", "pull"), (4.8, "0.05", "classify")):
    write(87.3, y, f"+ {weight}", GREY, ha="right", va="baseline")
    write(88.3, y, name, GREY, ha="left", va="baseline", weight="bold")
