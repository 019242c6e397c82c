"""All sites of one model: putting our norms in, measuring and freezing them, and taking them out again.

It is the only model surgery of fine-tuning. Where the sites are, `families` knows.
"""

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any, get_args

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune import folding
from finetune.checkpoint import no_progress_bars
from finetune.errors import CheckpointError
from finetune.fake_norm import CLASSES, STD_MEANS, Divisor, FakeLayerNorm, NormedConv1D, TokenClasses
from finetune.families import Norm, family_of
from finetune.recipe import StdMean, TokenClass
from finetune.schedule import Event


class Sites:
    """The sites of one model, by name (`h.0.qk`, `h.0.v`, `h.0.mlp`, …, `final`), and what is done to them together.

    Making it changes `model` in place: each norm of a block becomes `nn.Identity` and the module that reads it a
    `NormedConv1D`, and the final norm becomes a `FakeLayerNorm`; parameters keep their values. `to_plain` returns an
    ordinary model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eot_token_id: int | None,
        classes: Collection[TokenClass] = get_args(TokenClass),
        std_mean: StdMean = "arithmetic",
    ) -> None:
        """Put our norms into `model`.

        The tokens of `classes` have constants of their own until they are merged; constants are means of the kind
        `std_mean`.

        Raises:
            CheckpointError: the model is of an unknown family, or its norms are frozen or gone already.
        """
        if (state := folding.norm_state(model)) != "live":
            raise CheckpointError(
                f"The norms of this model are {state} already, there is no LayerNorm to remove: name the model that it "
                f"was made from, or any other {type(model).__name__} with live norms."
            )
        self.model = model
        self.classes = TokenClasses(eot_token_id, classes)
        self._std_mean: StdMean = std_mean
        self.norms: list[FakeLayerNorm] = []
        self._divisors: dict[str, Divisor] = {}
        self._readers: list[NormedConv1D] = []
        self._plain_paths: dict[str, str] = {}
        """The paths that modules have in an ordinary model, by those that they have with our norms."""
        self._begun: set[Divisor] = set()
        self._observed: list[Float[Tensor, "norms+1 3"]] = []
        for norm in folding.norms_of(model):
            fake = FakeLayerNorm(model.get_submodule(norm.path), len(norm.sites), self.classes, std_mean)  # type: ignore[arg-type]
            self.norms.append(fake)
            self._divisors |= {site.name: divisor for site, divisor in zip(norm.sites, fake.divisors, strict=True)}
            if norm.layer is None:  # what reads it takes logits in pieces, with the loss
                model.set_submodule(norm.path, fake)
            else:
                self._put_before_reader(norm, fake)
        model.base_model.register_forward_pre_hook(self._classify, with_kwargs=True)

    def _put_before_reader(self, norm: Norm, fake: FakeLayerNorm) -> None:
        (reader,) = norm.readers
        conv: Any = self.model.get_submodule(reader.path)
        columns = [reader.columns(site.kind, conv.nf) for site in norm.sites]
        normed = NormedConv1D(fake, conv, widths=tuple(part.stop - part.start for part in columns))
        self.model.set_submodule(reader.path, normed)
        self.model.set_submodule(norm.path, nn.Identity())
        self._readers.append(normed)
        self._plain_paths |= {f"{reader.path}.norm": norm.path, f"{reader.path}.conv": reader.path}

    @property
    def constant(self) -> bool:
        """Whether every norm is a constant."""
        return self._readers[0].constant

    def _classify(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        past = kwargs.get("past_key_values")
        self.classes.set(args[0] if args else kwargs["input_ids"], 0 if past is None else past.get_seq_length())

    def __getitem__(self, name: str) -> Divisor:
        """Return what divides at the site called `name`."""
        return self._divisors[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the sites."""
        return iter(self._divisors)

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the live stds of the last forward: once a micro-batch, however often it was recomputed."""
        to_mean, _ = STD_MEANS[self._std_mean]
        stds = to_mean(torch.stack([norm.live_std.detach() for norm in self.norms]))
        members = [self.classes.index == c for c in range(len(CLASSES))]
        sums = torch.stack([(stds * member).sum((1, 2)) for member in members], dim=-1)
        counts = torch.stack([member.sum() for member in members])
        self._observed.append(torch.cat([sums, counts.unsqueeze(0)]))

    @torch.no_grad()
    def update(self, decay: float) -> Float[Tensor, "sites 3"]:
        """Take what was observed, by every process, into the running means: once an optimizer step.

        Returns the mean live std of each site by class of token; NaN where there was no token of the class.
        """
        total = torch.stack(self._observed).sum(0)
        self._observed.clear()
        if dist.is_initialized():
            dist.all_reduce(total)
        *sums, count = total.unbind()
        _, from_mean = STD_MEANS[self._std_mean]
        means = []
        for norm, std_sum in zip(self.norms, sums, strict=True):
            for divisor in norm.divisors:
                divisor.update(std_sum, count, decay)
                means.append(from_mean(std_sum / count))
        return torch.stack(means)

    @torch.no_grad()
    def advance(self, events: Sequence[Event], step: int) -> list[Event]:
        """Bring every site to where `events` have it at `step`; return the events that begin at this step.

        Called at the beginning of every step, in order. When the last event is complete the norms become constants.
        """
        for event in events:
            if not event.step <= step <= event.end:
                continue
            if event.phase in get_args(TokenClass):
                for divisor in self._divisors.values():
                    divisor.merged[CLASSES.index(event.phase)] = event.progress(step)
            else:
                divisor = self._divisors[event.name]
                if step == event.step:
                    divisor.freeze()
                divisor.alpha.fill_(event.progress(step))
        whole = len(events) == len(self._divisors) + len(self.classes.own)
        complete = whole and all(step >= event.end for event in events)
        began = [event.name for event in events if event.step <= step and event.phase not in get_args(TokenClass)]
        self._begun |= {self._divisors[name] for name in began}
        for reader in self._readers:
            reader.live, reader.constant = self._begun.isdisjoint(reader.norm.divisors), complete
        return [event for event in events if event.step == step]

    def constants(self) -> Float[Tensor, "sites 3"]:
        """Return the constant of each site by class of token."""
        return torch.stack([divisor.constants() for divisor in self._divisors.values()])

    @torch.no_grad()
    def to_plain(self) -> PreTrainedModel:
        """Return an ordinary model: with live norms if no site is frozen, LN-free (format b25) if all are.

        Raises:
            CheckpointError: some sites are frozen and others not, or a class of token is not merged.
        """
        own = [CLASSES.index(name) for name in self.classes.own]
        begun = {name for name, divisor in self._divisors.items() if divisor.alpha > 0 or divisor.merged.any()}
        frozen = {name for name, divisor in self._divisors.items() if divisor.alpha == 1 and divisor.merged[own].all()}
        if begun and frozen != set(self._divisors):
            raise CheckpointError(
                f"Still to be frozen or merged: {', '.join(name for name in self if name not in frozen)}. Such a model "
                "is neither LN-free nor an ordinary one: train on to the end of its schedule."
            )
        state = {}
        for name, tensor in self.model.state_dict().items():
            module, _, parameter = name.rpartition(".")
            if ".divisors." not in name:  # a copy: what is frozen below is not this model
                state[f"{self._plain_paths.get(module, module)}.{parameter}"] = tensor.clone()
        with no_progress_bars():
            plain: PreTrainedModel = (
                family_of(self.model)
                .model_class.from_pretrained(
                    None, config=copy.deepcopy(self.model.config), state_dict=state, dtype=self.model.dtype
                )
                .eval()
            )
        plain.config.name_or_path = self.model.config.name_or_path
        plain.generation_config = copy.deepcopy(self.model.generation_config)
        if frozen:
            folding.freeze(plain, {name: divisor.frozen[0] for name, divisor in self._divisors.items()})
        return plain
