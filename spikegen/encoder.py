"""The encoder, of autoencoders and of classifiers: an image, or frames of events, through the stages to spikes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, cast

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from spikegen.attention import Attention
from spikegen.draws import uniform_per_image
from spikegen.encoding import Encoding, EncodingSpec
from spikegen.kernels import Engine
from spikegen.neurons import NeuronSpec
from spikegen.residual import ResidualSpec, ResidualStage, Stem, StemSpec
from spikegen.spec import UserError, default_kind
from spikegen.stages import Stage, StageSpec, down_stage
from spikegen.threshold_norm import ThresholdNorm

EncoderStageSpec = StageSpec | StemSpec | ResidualSpec
EncoderStage = Annotated[EncoderStageSpec, Field(discriminator="kind"), default_kind("conv")]


def check_stages(stages: Sequence[EncoderStageSpec]) -> None:
    """ValueError unless the stages are convolutions, or a stem and then residual ones."""
    kinds = [s.kind for s in stages]
    residual = ["stem", *["residual"] * max(1, len(kinds) - 1)]
    if kinds not in (["conv"] * len(kinds), residual):
        raise ValueError(f"stages are all conv, or a stem and then residual ones; got {', '.join(kinds)}")


def reduction(stages: Sequence[EncoderStageSpec]) -> int:
    """By how much the stages divide height and width."""
    factor = 1
    for stage in stages:
        factor *= stage.reduction
    return factor


class Encoder(nn.ModuleList):
    """The stages in order; called with images, it encodes them first."""

    def __init__(
        self,
        stages: Sequence[EncoderStageSpec],
        image_shape: tuple[int, int, int],
        num_steps: int,
        encoding: EncodingSpec,
        neuron: NeuronSpec,
        engine: Engine,
        attention: Attention | None,
        norm_scale: float | None = None,
    ):
        """`attention` is that of the stages that inherit it; `norm_scale` None brings currents to the threshold."""
        super().__init__()
        self.image_shape, self.num_steps = image_shape, num_steps
        self.encoding: Encoding = encoding.build(num_steps)
        self.meanings: list[dict[str, object]] = []
        """What each stage does that is not in its weights, nothing inherited; a surrogate changes no spike."""
        width = image_shape[0]
        for k, spec in enumerate(stages):
            own = neuron if isinstance(spec, StemSpec) else spec.neuron or neuron
            alpha = 1.0 if norm_scale is None else norm_scale / own.mean_threshold
            if isinstance(spec, StemSpec):
                self.append(Stem(spec, width, alpha * own.mean_threshold))
                self.meanings.append(spec.model_dump())
            else:
                chosen = attention if spec.attention == "inherit" else spec.attention
                whole = spec.model_copy(update={"neuron": own, "attention": chosen})
                learnt = {name for name in ("beta", "threshold") if getattr(own, f"learn_{name}", False)}
                self.meanings.append(whole.model_dump(exclude={"neuron": {"surrogate", *learnt}}))
                if isinstance(spec, StageSpec):
                    gate = chosen.build(num_steps, spec.channels) if chosen else None
                    self.append(down_stage(spec, width, own, engine, gate, alpha))
                else:
                    last = k == len(stages) - 1
                    self.append(ResidualStage(spec, width, own, engine, chosen, num_steps, last, alpha))
            width = spec.channels
        height, wide = (_size_after(stages, size) for size in image_shape[1:])
        self.shape = (width, height, wide)
        """Of the features at each step: channels, height, width."""

    def forward(
        self, image: Float[Tensor, " B *image"], uniform: Float[Tensor, "T B C H W"] | None = None
    ) -> tuple[Float[Tensor, "T B D h w"], list[Float[Tensor, ""]]]:
        """The last stage's spikes and every firing stage's rate, for images [B, C, H, W] or frames [B, T, C, H, W].

        `uniform` fixes the draws of an encoding that has any.
        """
        first, *rest = self
        rates: list[Tensor] = []
        if isinstance(first, Stem):
            x = first(image.unsqueeze(0) if self.encoding.static else self.encoding(image, uniform))
            x = x.expand(self.num_steps, *x.shape[1:])
        else:
            assert isinstance(first, Stage)
            if self.encoding.static:
                # The same current at every step: convolve and normalise once, not T times.
                x, rate = first.fire(first.layer(image).unsqueeze(0), self.num_steps)
            else:
                x, rate = first(self.encoding(image, uniform))
            rates.append(rate)
        for stage in rest:
            x, rate = stage(x)
            rates.append(rate)
        return x, rates

    def draws(self, image: Tensor, seed: int, first: int) -> Float[Tensor, "T B C H W"] | None:
        """The `uniform` that fixes the encoding of images first, first+1, ... of a set; None where nothing is drawn."""
        if self.encoding.static or self.encoding.has_time:
            return None
        return uniform_per_image(~seed, first, len(image), (self.num_steps, *self.image_shape), image.device)

    def take_over(self, given: "Encoder", source: str) -> None:
        """Take the weights of `given`, an autoencoder's or a classifier's, and so compute what it does.

        UserError, which names it by `source`, where the stages differ in shape or in what no weight says, such as a
        neuron's leak. Norms of another scale are rescaled; surrogates, steps and the encoding of images may differ.
        """
        wrong = f"the encoder of {source} does not fit:"
        right = "give model.stages, model.neuron, model.attention and model.num_steps as that run has them"
        own, weights = self.state_dict(), given.state_dict()
        for key in [*own, *weights]:
            here, there = (f"of shape {list(s[key].shape)}" if key in s else "absent" for s in (own, weights))
            if here != there:
                raise UserError(f"{wrong} stage {key} is {there} there and {here} here; {right}")
        for k, (mine, its) in enumerate(zip(self.meanings, given.meanings, strict=True)):
            for path, here, there in _differences(mine, its):
                raise UserError(f"{wrong} stage {k}'s {path} is {there} there and {here} here; {right}")
        for key, norm in self.named_modules():
            if isinstance(norm, ThresholdNorm):
                its_norm = cast(ThresholdNorm, given.get_submodule(key))
                weights[f"{key}.weight"] = weights[f"{key}.weight"] * (its_norm.scale / norm.scale)
        self.load_state_dict(weights)

    def check(self, image: Tensor) -> None:
        """UserError unless the model takes images of this shape."""
        wanted = (*((self.num_steps,) if self.encoding.has_time else ()), *self.image_shape)
        if tuple(image.shape[1:]) != wanted:
            raise UserError(f"the model takes images of {wanted}; got {tuple(image.shape[1:])}")


def _differences(here: Any, there: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two nested mappings differ: the key, and both values."""
    if isinstance(here, Mapping) and isinstance(there, Mapping) and here.keys() == there.keys():
        for key in here:
            yield from _differences(here[key], there[key], f"{path}.{key}".lstrip("."))
    elif here != there:
        yield path, here, there


def _size_after(stages: Sequence[EncoderStageSpec], size: int) -> int:
    """Convolutions with a stride round up, pooling rounds down."""
    for stage in stages:
        size = -(-size // stage.stride)
        if isinstance(stage, StageSpec) and stage.pool is not None:
            size //= stage.pool.size
    return size
