"""What files may become when they are read: limits on files that strangers made, in one place.

A small file can hold a large one: pixels of one colour, zeros in an archive, a header that promises more than
follows. Readers compare what a file says with these numbers before they allocate.
"""

from __future__ import annotations

MIB = 1 << 20

IMAGE_PIXELS = 178_000_000  # of one image: just below 2 * 89,478,485, from where Pillow itself refuses
IMAGE_BYTES = 1024 * MIB  # that decoding one image takes at its peak, or all frames of a clip together
FRAME_PIXELS = 36_000_000  # of one frame of a video (8K has 35.4 million), since a codec holds up to 17
SCALED_PIXELS = 64 * MIB  # of an image that was scaled to cover a size: a line would grow without bound

ARRAY_BYTES = 256 * MIB  # of an array of statistics: a covariance of 5,792 features in float64
JSON_BYTES = 1 * MIB  # of JSON that says something of one thing: a manifest, a state, a recipe, a result
INDEX_BYTES = 16 * MIB  # of JSON that lists things: shards, class names, tensors
HEADER_BYTES = 1 * MIB  # of the header of a shard of latents, which has half a dozen tensors
CLASSES = 1_000_000  # a label beyond is a mistake, and would cost as many names

# Of a model, of our recipes as of a stranger's config: what decides how much is built or allocated.
SIDE = 65_536  # of a latent or a window, in channels or in heads
PATCH, KERNEL, MLP_RATIO = 1_024, 1_023, 64
LABELS = 10_000_000  # that a model may embed

INFLATED_BYTES, INFLATED_TIMES = 64 * MIB, 50


def inflated(size: int) -> int:
    """Bytes that a compressed part of ``size`` bytes may become: images and features hardly shrink."""
    return max(INFLATED_BYTES, INFLATED_TIMES * size)
