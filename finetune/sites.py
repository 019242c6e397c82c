"""Which norms a model has, putting ours in, taking them out again: the only model surgery of fine-tuning.

A site is one place that divides by a std. Block i has three, its `ln_2`, its `ln_1` on the QK path and its `ln_1` on
the V path, and the model has one more, `ln_f`: 3·L + 1 in all.
"""

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, get_args

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from finetune.checkpoint import FROZEN_EPS, CheckpointError, norm_state, require_gpt2, without_bars
from finetune.fake_layernorm import CLASSES, STD_MEANS, FakeLayerNorm, NormedConv1D, Site, TokenClasses
from finetune.objective import DeferredUnembedding
from finetune.recipe import StdMean, TokenClass
from finetune.schedule import Event


class Sites:
    """The sites of one model, by name (`h.0.ln_2`, `h.0.qk`, `h.0.v`, …, `ln_f`), and what is done to them together.

    Making it changes `model` in place: `ln_1` and `ln_2` become `nn.Identity`, the Conv1D that reads each becomes a
    `NormedConv1D`, and `ln_f` a `FakeLayerNorm`; parameters keep their values. `to_plain` returns an ordinary model.
    """

    def __init__(
        self,
        model: GPT2LMHeadModel,
        eot_token_id: int | None,
        classes: Collection[TokenClass] = get_args(TokenClass),
        std_mean: StdMean = "arithmetic",
    ) -> None:
        """Put our norms into `model`.

        The tokens of `classes` have constants of their own until they are merged; constants are means of the kind
        `std_mean`.

        Raises:
            CheckpointError: not a GPT-2, or its LNs are frozen or gone already.
        """
        if (state := norm_state(require_gpt2(model))) != "live":
            raise CheckpointError(
                f"The norms of this model are {state} already, there is no LayerNorm to remove: name the model that it "
                "was made from, or any other GPT-2 with LayerNorm."
            )
        self.model = model
        self.classes = TokenClasses(eot_token_id, classes)
        self._std_mean: StdMean = std_mean
        self.norms: list[FakeLayerNorm] = []
        self._sites: dict[str, Site] = {}
        self._readers: list[NormedConv1D] = []
        self._begun: set[Site] = set()
        self._observed: list[Float[Tensor, "norms+1 3"]] = []
        block: Any
        for i, block in enumerate(model.transformer.h):
            d = block.ln_1.weight.shape[0]
            norm_1, norm_2 = (
                self._fake(block.ln_1, f"h.{i}.qk", f"h.{i}.v"),
                self._fake(block.ln_2, f"h.{i}.ln_2"),
            )
            block.attn.c_attn = NormedConv1D(norm_1, block.attn.c_attn, widths=(2 * d, d))
            block.mlp.c_fc = NormedConv1D(norm_2, block.mlp.c_fc, widths=(block.mlp.c_fc.nf,))
            block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
            self._readers += [block.attn.c_attn, block.mlp.c_fc]
        model.transformer.ln_f = self._fake(model.transformer.ln_f, "ln_f")  # type: ignore[assignment]
        model.transformer.register_forward_pre_hook(self._classify, with_kwargs=True)

    def _fake(self, norm: nn.LayerNorm, *names: str) -> FakeLayerNorm:
        fake = FakeLayerNorm(norm, len(names), self.classes, self._std_mean)
        self.norms.append(fake)
        self._sites.update(zip(names, fake.sites, strict=True))
        return fake

    @property
    def constant(self) -> bool:
        """Whether every norm is a constant."""
        return self._readers[0].constant

    def defer_unembedding(self) -> None:
        """Have the model return the last site's output in place of logits, for a loss that takes them in pieces."""
        self.model.lm_head = DeferredUnembedding(self.model.lm_head)

    def _classify(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        past = kwargs.get("past_key_values")
        self.classes.set(args[0] if args else kwargs["input_ids"], 0 if past is None else past.get_seq_length())

    def __getitem__(self, name: str) -> Site:
        """Return the site called `name`."""
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the sites."""
        return iter(self._sites)

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
            for site in norm.sites:
                site.update(std_sum, count, decay)
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
                for site in self._sites.values():
                    site.merged[CLASSES.index(event.phase)] = event.progress(step)
            else:
                site = self._sites[event.name]
                if step == event.step:
                    site.freeze()
                site.alpha.fill_(event.progress(step))
        whole = len(events) == len(self._sites) + len(self.classes.own)
        complete = whole and all(step >= event.end for event in events)
        self._begun |= {self._sites[event.name] for event in events if event.name in self._sites and event.step <= step}
        for reader in self._readers:
            reader.live, reader.constant = self._begun.isdisjoint(reader.norm.sites), complete
        return [event for event in events if event.step == step]

    def constants(self) -> Float[Tensor, "sites 3"]:
        """Return the constant of each site by class of token."""
        return torch.stack([site.constants() for site in self._sites.values()])

    @torch.no_grad()
    def to_plain(self) -> GPT2LMHeadModel:
        """Return an ordinary model: with LayerNorm if no site is frozen, LN-free (format b25) if all are.

        LN-free, `ln_1` has one scale: it carries σ_QK, and with r = σ_QK/σ_V the V columns become r·W_V and their
        bias b_V + (1−r)·βW_V.

        Raises:
            CheckpointError: some sites are frozen and others not, or a class of token is not merged.
        """
        own = [CLASSES.index(name) for name in self.classes.own]
        begun = {name for name, site in self._sites.items() if site.alpha > 0 or site.merged.any()}
        frozen = {name for name, site in self._sites.items() if site.alpha == 1 and site.merged[own].all()}
        if begun and frozen != set(self._sites):
            raise CheckpointError(
                f"Still to be frozen or merged: {', '.join(name for name in self if name not in frozen)}. Such a model "
                "is neither LN-free nor an ordinary one: train on to the end of its schedule."
            )
        config = copy.deepcopy(self.model.config)
        state = {
            name.replace("attn.c_attn.norm", "ln_1").replace("mlp.c_fc.norm", "ln_2").replace(".conv.", "."): tensor
            for name, tensor in self.model.state_dict().items()
            if ".sites." not in name
        }
        if frozen:
            config.layer_norm_epsilon = FROZEN_EPS
            self._freeze_plain(state)
        with without_bars():
            plain = GPT2LMHeadModel.from_pretrained(
                None, config=config, state_dict=state, dtype=self.model.dtype
            ).eval()
        plain.config.name_or_path = self.model.config.name_or_path
        plain.generation_config = copy.deepcopy(self.model.generation_config)
        return plain

    def _freeze_plain(self, state: dict[str, Tensor]) -> None:
        """Put the constants into the weights of a plain model's `state`, in float64, rounded once."""

        def std(name: str) -> Tensor:
            return self._sites[name].frozen[0].double()

        def scale(weight: str, factor: Tensor) -> None:
            state[weight] = (state[weight].double() * factor).to(state[weight])

        root = math.sqrt(FROZEN_EPS)
        scale("transformer.ln_f.weight", root / std("ln_f"))
        for i in range(self.model.config.n_layer):
            block = f"transformer.h.{i}"
            ratio = std(f"h.{i}.qk") / std(f"h.{i}.v")
            weight, bias = state[f"{block}.attn.c_attn.weight"], state[f"{block}.attn.c_attn.bias"]
            is_value = torch.arange(len(bias), device=bias.device) >= weight.shape[0] * 2
            through_beta = state[f"{block}.ln_1.bias"].double() @ weight.double()
            shifted = bias.double() + (1 - ratio) * through_beta * is_value
            state[f"{block}.attn.c_attn.bias"] = shifted.to(bias)
            scale(f"{block}.attn.c_attn.weight", torch.where(is_value, ratio, 1.0))
            scale(f"{block}.ln_1.weight", root / std(f"h.{i}.qk"))
            scale(f"{block}.ln_2.weight", root / std(f"h.{i}.ln_2"))
