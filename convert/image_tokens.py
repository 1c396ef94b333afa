"""Fewer tokens per image: neighbouring image features are averaged, and nothing is trained.

Reading an image is most of the time to the first word, and it grows with the image's tokens. CLIP-L/336 has 24 x 24 of
them; averaged 2 x 2, as LLaVA-NeXT does for videos, they are 144. No weight changes: the number is a config value.
"""

from __future__ import annotations

from dataclasses import replace

from gm_mlx.convert.translate import Translation
from gm_mlx.errors import UserError


def set_image_tokens(made: Translation, tokens: int) -> Translation:
    """The same model with another number of tokens per image.

    Args:
        made: the model; one that pools already is counted from all its patches like any other.
        tokens: the number of patches, or what is left of them when squares of them become one.

    Raises:
        UserError: the model cannot have that number. The message lists those that it can have.
    """
    config, grid = made.config, made.config.vision_config.grid
    if config.projector_type != "mlp2x_gelu":
        raise UserError(
            f"--image-tokens {tokens}: its projector {config.projector_type!r} makes {config.num_image_tokens} tokens; "
            "leave it out"
        )
    if not config.features_are_grid:
        raise UserError(
            f"--image-tokens {tokens}: a model with vision_feature_select_strategy "
            f"{config.vision_feature_select_strategy!r} and {config.num_image_features} features of "
            f"{grid} x {grid} patches can have {config.num_image_features} only; leave it out"
        )
    strides = {(grid // stride) ** 2: stride for stride in range(1, grid + 1) if grid % stride == 0}
    if tokens not in strides:
        raise UserError(
            f"--image-tokens {tokens}: {grid} x {grid} patches cannot be averaged to that; it can be one of "
            f"{', '.join(map(str, strides))}"
        )
    notes = list(made.notes)
    if strides[tokens] > config.spatial_pool_stride:
        notes.append(
            f"an image takes {tokens} tokens instead of {config.num_image_tokens}, each the average of several: small "
            "things may be missed until the model is trained like this"
        )
    return replace(
        made,
        config=replace(config, spatial_pool_stride=strides[tokens]),
        processor=replace(made.processor, tokens_per_image=tokens),
        provenance={**made.provenance, "image_tokens": tokens},
        notes=notes,
    )
