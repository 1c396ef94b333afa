"""What a model is, as data: ``config.json``; ``gm_mlx.presets`` has the papers' models.

``config.json`` follows Hugging Face's LLaVA layout (``text_config``, ``vision_config`` and the keys of the join), with
``model_type`` "llava_gm" and one table more, ``text_config.moe``. Keys that shape the model are checked: an unknown one
is an error, because a misspelt key would otherwise be a silently different model. Keys that describe and do not shape
(``architectures``, ``torch_dtype``, ids of special tokens, ...) are kept as they are and written back.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gm_mlx.config_checks import DESCRIPTIVE, build, check_activation, check_types, one_of
from gm_mlx.errors import UserError

MODEL_TYPE = "llava_gm"

LayerMode = Literal["sparse", "first_half", "second_half", "dense", "custom"]

# Where MoE-LLaVA puts its experts (MoE-LLaVA, llava_phi_moe.py, initialize_moe_modules). "dense" is its word for
# "every layer". "custom" takes the list that is stored with it.
LAYER_MODES = {
    "sparse": lambda n: list(range(0, n, 2)),
    "first_half": lambda n: list(range(n // 2)),
    "second_half": lambda n: list(range(n // 2, n)),
    "dense": lambda n: list(range(n)),
}

NORMS = ("rms", "layer")
ATTENTION_BIASES = ("none", "qkv", "all")
SPARSE_KINDS = ("experts", "evf")
PROJECTOR_TYPES = ("mlp2x_gelu", "ldpnet", "ldpnetv2")
LDPV2_GRID = 12  # side of the grid that LDPv2 makes of any other (MobileVLM V2, TokenDownLayer)

# What an elastic vision FFN is, beside its language FFN: Eve, "2 experts, top-1".
EVF = {"num_experts": 2, "top_k": 1, "use_residual": False, "expert_size": 0}


@dataclass(frozen=True)
class MoEConfig:
    """The experts of a decoder.

    Attributes:
        num_experts: experts per sparse layer, E.
        top_k: experts per token, k.
        mode: which layers are sparse, a key of ``LAYER_MODES`` or "custom".
        layers_idx: the sparse layers of mode "custom"; empty otherwise.
        norm_topk_prob: divide the chosen probabilities by their sum. True is DeepSpeed's top-2 gate; false is the
            papers' equation and DeepSpeed's top-1 gate.
        router_rank: rank of a low-rank router, or 0 for a full one. E - 1 loses nothing (see ``moe.low_rank``).
        use_residual: DeepSpeed's residual MoE: a dense FFN beside the experts, mixed by a learnt coefficient.
        aux_loss_coef: weight of the load-balancing loss in training.
        expert_size: neurons of an expert, or 0 for as many as a dense FFN has (``intermediate_size``).
        kind: "experts", which are alike; or "evf", Eve's elastic vision FFN: a language FFN, a vision FFN and a router
            over the two (see ``gm_mlx.evf``). ``num_experts`` is 2 and ``top_k`` 1 then.
        modality_priority: of an "evf", what a position's own FFN has ahead of the other when one of them is chosen
            (S_i and S_t, Eve eq. 3). 0 leaves the choice to the router alone.
    """

    num_experts: int = 4
    top_k: int = 2
    mode: LayerMode = "sparse"
    layers_idx: tuple[int, ...] = ()
    norm_topk_prob: bool = True
    router_rank: int = 0
    use_residual: bool = False
    aux_loss_coef: float = 0.01
    expert_size: int = 0
    kind: Literal["experts", "evf"] = "experts"
    modality_priority: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers_idx", tuple(self.layers_idx))
        one_of("text_config.moe.kind", self.kind, SPARSE_KINDS)
        for key, value in EVF.items() if self.kind == "evf" else ():
            if getattr(self, key) != value:
                raise UserError(f"text_config.moe.{key}: {getattr(self, key)!r} is not {value!r}, as kind 'evf' has it")
        if not self.modality_priority >= 0:
            raise UserError(f"text_config.moe.modality_priority: {self.modality_priority!r} is not 0 or more")
        if self.mode not in LAYER_MODES and self.mode != "custom":
            raise UserError(f"text_config.moe.mode: {self.mode!r} is not one of {[*LAYER_MODES, 'custom']}")
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(f"text_config.moe.top_k: {self.top_k} is not between 1 and num_experts={self.num_experts}")

    def layers(self, num_layers: int) -> list[int]:
        """The indices of the sparse layers in a decoder of ``num_layers`` layers."""
        if self.mode != "custom":
            return LAYER_MODES[self.mode](num_layers)
        if any(not 0 <= i < num_layers for i in self.layers_idx):
            raise UserError(f"text_config.moe.layers_idx: {list(self.layers_idx)} leaves the {num_layers} layers")
        return list(self.layers_idx)


@dataclass(frozen=True)
class TextConfig:
    """A decoder, some of whose FFNs may be mixtures of experts. The defaults are Gemma-1's.

    What sets the families apart, one field each:

    Attributes:
        norm: "rms", or "layer" for LayerNorm with bias (StableLM, Phi).
        norm_plus_one: RMSNorm multiplies by 1 + weight (Gemma) and not by weight (Llama, Mistral, Qwen).
        scale_embeddings: token embeddings are multiplied by sqrt(hidden_size) (Gemma).
        attention_bias: which of attention's linears have a bias: "none", "qkv" (Qwen, StableLM) or "all" (Phi).
        partial_rotary_factor: the share of a head that is rotated (StableLM 0.25, Phi-2 0.4).
        parallel_block: attention and FFN both read the block's one norm and are added together (Phi).
        gated: the FFN is ``down(act(gate x) * up x)`` without biases, or else ``fc2(act(fc1 x))`` with biases (Phi).
        series_layers: the first so many layers have a second gate in their FFN (PanGu-pi; see ``gm_mlx.pangu``).
        shortcut_size: channels inside the augmented shortcut around attention of all layers behind those (PanGu-pi);
            0 for none.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    hidden_act: str = "gelu_pytorch_tanh"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_plus_one: bool = True
    scale_embeddings: bool = True
    attention_bias: Literal["none", "qkv", "all"] = "none"
    partial_rotary_factor: float = 1.0
    parallel_block: bool = False
    gated: bool = True
    series_layers: int = 0
    shortcut_size: int = 0
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        check_activation("text_config", self.hidden_act)
        one_of("text_config.norm", self.norm, NORMS)
        one_of("text_config.attention_bias", self.attention_bias, ATTENTION_BIASES)
        if not 0 < self.partial_rotary_factor <= 1 or self.rotary_dim % 2:
            raise UserError(
                f"text_config.partial_rotary_factor: {self.partial_rotary_factor} of a head of {self.head_dim} is not "
                "an even number of its channels"
            )
        if isinstance(self.moe, dict):
            object.__setattr__(self, "moe", build(MoEConfig, self.moe, "text_config.moe"))
        self._check_pangu()

    def _check_pangu(self) -> None:
        """Refuse second gates and shortcuts where nothing has a place for them."""
        if self.series_layers and (not self.gated or self.series_layers > self.num_hidden_layers):
            why = f"more than the {self.num_hidden_layers} layers" if self.gated else "for gated networks only"
            raise UserError(f"text_config.series_layers: {self.series_layers} is {why}")
        if self.shortcut_size and self.parallel_block:
            raise UserError("text_config.shortcut_size: a parallel block has no place for a shortcut around attention")
        experts = self.series_layers and self.moe is not None and self.moe.kind == "experts"
        if experts and (layers := [i for i in self.sparse_layers if i < self.series_layers]):
            raise UserError(f"text_config.series_layers: experts have one gate, and layer {layers[0]} has experts")

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotary positions turn; the others pass as they are."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def sparse_layers(self) -> list[int]:
        """The indices of the layers whose FFN is a mixture of experts."""
        return self.moe.layers(self.num_hidden_layers) if self.moe else []


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP or a SigLIP vision transformer.

    Attributes:
        model_type: which of the two: with a class token and a norm before the first layer, or with neither.
        post_norm: the tower's last norm is applied to what is read (Eve's SigLIP); LLaVA leaves it out.
    """

    model_type: Literal["clip_vision_model", "siglip_vision_model"]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    post_norm: bool = False

    def __post_init__(self) -> None:
        check_activation("vision_config", self.hidden_act)
        one_of("vision_config.model_type", self.model_type, ("clip_vision_model", "siglip_vision_model"))

    @property
    def is_clip(self) -> bool:
        return self.model_type == "clip_vision_model"

    @property
    def grid(self) -> int:
        """Patches along each side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2


@dataclass(frozen=True)
class ModelConfig:
    """Tower, projector and decoder, joined.

    Attributes:
        image_token_index: the token id that stands for one image feature in a prompt.
        vision_feature_layer: which hidden state of the tower is used; -2 is LLaVA's, -1 the last.
        vision_feature_select_strategy: "default" drops the tower's first position, which is CLIP's class token but a
            patch of SigLIP's, as Hugging Face and MoE-LLaVA do; "full" keeps all.
        projector_hidden_act: activation of the projector; LLaVA's is the exact (erf) GELU.
        scale_image_features: multiply image features by sqrt(hidden_size), as transformers before 5.4 did for Gemma
            decoders and later ones do not. The same weights answer differently under the two.
        spatial_pool_stride: projected features are averaged in squares of so many by so many patches (LLaVA-NeXT's
            ``mm_spatial_pool_stride``); 1 leaves them as they are.
        projector_type: "mlp2x_gelu", LLaVA's two layers; or MobileVLM's "ldpnet" and "ldpnetv2", which make a quarter
            as many tokens of 24 x 24 patches (see ``gm_mlx.projector``).
        extra: descriptive keys that came with ``config.json``; written back, never interpreted.
    """

    text_config: TextConfig
    vision_config: VisionConfig
    image_token_index: int
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    projector_hidden_act: str = "gelu"
    scale_image_features: bool = False
    spatial_pool_stride: int = 1
    projector_type: Literal["mlp2x_gelu", "ldpnet", "ldpnetv2"] = "mlp2x_gelu"
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        check_activation("projector_hidden_act", self.projector_hidden_act)
        layers = self.vision_config.num_hidden_layers
        if not -layers - 1 <= self.vision_feature_layer <= layers:
            raise UserError(f"vision_feature_layer: {self.vision_feature_layer} is outside a tower of {layers} layers")
        one_of("vision_feature_select_strategy", self.vision_feature_select_strategy, ("default", "full"))
        one_of("projector_type", self.projector_type, PROJECTOR_TYPES)
        self._check_pooling()

    def _check_pooling(self) -> None:
        """Refuse to average what is not a grid of patches, or a grid that squares do not fill."""
        stride, grid = self.spatial_pool_stride, self.vision_config.grid
        if stride < 1:
            raise UserError(f"spatial_pool_stride: {stride} is not 1 or more")
        ldp = self.projector_type != "mlp2x_gelu"
        if (stride > 1 or ldp) and not self.features_are_grid:
            what = (
                f"projector_type: {self.projector_type!r} reads" if ldp else f"spatial_pool_stride: {stride} averages"
            )
            remedy = "choose the other" if ldp else "only 1 fits"
            raise UserError(
                f"{what} a grid of patches, but vision_feature_select_strategy "
                f"{self.vision_feature_select_strategy!r} gives {self.num_image_features} features of {grid} x {grid} "
                f"patches; {remedy}"
            )
        if stride > 1 and ldp:
            raise UserError(
                f"spatial_pool_stride: {stride}, but {self.projector_type!r} makes fewer tokens itself; only 1 fits"
            )
        if grid % stride:
            raise UserError(f"spatial_pool_stride: {stride} does not divide the {grid} patches of an image's side")

    @property
    def num_image_features(self) -> int:
        """Features of one image that the tower gives and the projector reads."""
        dropped = self.vision_feature_select_strategy == "default"
        return self.vision_config.num_patches + self.vision_config.is_clip - dropped

    @property
    def features_are_grid(self) -> bool:
        """Whether each patch has its feature and nothing else has one: no class token, and no patch dropped for it."""
        return self.num_image_features == self.vision_config.num_patches

    @property
    def num_image_tokens(self) -> int:
        """Positions that one image takes in the decoder's context."""
        if self.projector_type == "mlp2x_gelu":
            return self.num_image_features // self.spatial_pool_stride**2
        # LDP's second block has a stride of 2, and padding that keeps an odd side's last patch.
        return ((self.vision_config.grid + 1) // 2 if self.projector_type == "ldpnet" else LDPV2_GRID) ** 2

    @property
    def num_vision_layers_used(self) -> int:
        """Tower layers that run; the ones behind ``vision_feature_layer`` are neither run nor loaded."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Build from the contents of a ``config.json``; raises ``UserError`` that names the key."""
        if not isinstance(data, dict):
            raise UserError("the config is not a JSON object")
        data = dict(data)
        model_type = data.pop("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise UserError(f"model_type: {model_type!r} is not {MODEL_TYPE!r}; convert it first with `gm-mlx convert`")
        for key, kind in (("text_config", TextConfig), ("vision_config", VisionConfig)):
            if not isinstance(data.get(key), dict):
                raise UserError(f"{key}: missing from the config")
            data[key] = build(kind, data[key], key)
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra = {k: data.pop(k) for k in list(data) if k not in known}
        if unknown := [k for k in extra if k not in DESCRIPTIVE]:
            raise UserError(f"unknown key {unknown[0]!r}; the model's shape would be guessed")
        if "image_token_index" not in data:
            raise UserError("image_token_index: missing from the config")
        check_types(cls, data, "")
        return cls(**data, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The contents of ``config.json``; ``from_dict`` reads it back to an equal config."""
        data = dataclasses.asdict(self)
        extra = data.pop("extra")
        if data["text_config"]["moe"] is None:
            del data["text_config"]["moe"]
        return {"model_type": MODEL_TYPE, **data, **extra}

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read ``folder/config.json``; raises ``UserError`` that names the file."""
        path = Path(folder) / "config.json"
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"{path}: not found; a model folder has a config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid JSON ({error}); fetch or convert the model again") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def squeezed_size(size: int) -> int:
    """Channels inside LDP's squeeze-and-excitation: torchvision's ``_make_divisible(size // 4, 8)``."""
    rounded = max(8, (size // 4 + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * (size // 4) else rounded
