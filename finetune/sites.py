"""All sites of one model: inserting our norms, measuring and freezing them, and removing them again.

All model surgery of fine-tuning happens here. `families` defines where the sites are.
"""

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any, get_args

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune import folding
from finetune.checkpoint import no_progress_bars
from finetune.errors import CheckpointError
from finetune.fake_norm import CLASSES, STD_MEANS, Divisor, FakeNorm, NormedReader, TokenClasses
from finetune.families import family_of
from finetune.recipe import StdMean, TokenClass
from finetune.schedule import Event


class Sites:
    """The sites of one model, by name (`h.0.qk`, `h.0.v`, `h.0.mlp`, …, `final`), and operations on all of them.

    The constructor changes `model` in place: each norm becomes a `FakeNorm`, and each module that reads a block's norm
    becomes a `NormedReader`. Parameters keep their values and names. `to_plain` returns an ordinary model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eot_token_id: int | None,
        classes: Collection[TokenClass] = get_args(TokenClass),
        std_mean: StdMean = "arithmetic",
    ) -> None:
        """Insert our norms into `model`.

        Tokens of the given `classes` have their own constants until they are merged. A constant is a mean of the kind
        `std_mean`.

        Raises:
            CheckpointError: the model's family is not supported, or its norms are already frozen or removed.
        """
        if (state := folding.norm_state(model)) != "live":
            raise CheckpointError(
                f"The norms of this model are already {state}, so there is nothing to remove. Pass the model that it "
                f"was made from, or another {type(model).__name__} with live norms."
            )
        self.model = model
        self.classes = TokenClasses(eot_token_id, classes)
        self._std_mean: StdMean = std_mean
        self.norms: list[FakeNorm] = []
        """Our norms, the final one last."""
        self._divisors: dict[str, Divisor] = {}
        self._begun: set[Divisor] = set()
        self._observed: list[Float[Tensor, "norms+1 3"]] = []
        self._kept: list[tuple[Float[Tensor, "norms batch pos"], Int[Tensor, "batch pos"]]] = []
        self.least = 0.0
        """1/κ of the guard; 0 without one."""
        style, heads = family_of(model).style, model.config.num_attention_heads
        for norm in folding.norms_of(model):
            # The loss computes logits from the final norm's output in pieces, so that norm has no NormedReader.
            readers = norm.readers if norm.layer is not None else ()
            module = model.get_submodule(norm.path)
            fake = FakeNorm(module, style, len(norm.sites), self.classes, std_mean, has_readers=bool(readers))
            self.norms.append(fake)
            self._divisors |= {site.name: divisor for site, divisor in zip(norm.sites, fake.divisors, strict=True)}
            model.set_submodule(norm.path, fake)
            for reader in readers:
                linear = model.get_submodule(reader.path)
                normed = NormedReader(fake, linear, norm.paths(reader), groups=heads if reader.by_head else 1)
                model.set_submodule(reader.path, normed)
        model.base_model.register_forward_pre_hook(self._classify, with_kwargs=True)

    @property
    def constant(self) -> bool:
        """Whether every norm is constant."""
        return self.norms[0].constant

    def _classify(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        past = kwargs.get("past_key_values")
        self.classes.set(args[0] if args else kwargs["input_ids"], 0 if past is None else past.get_seq_length())

    def keep_live_graph(self) -> None:
        """Keep the graph of live stds, for `spread`, even if norms are ordinary or constant."""
        for norm in self.norms:
            norm.live_graph = True

    def __getitem__(self, name: str) -> Divisor:
        """Return the divisor of the site `name`."""
        return self._divisors[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the sites."""
        return iter(self._divisors)

    def guard(self, least: float, held: float = 0.0, noise: float = 1.0) -> None:
        """Require each scale to be at least `least` = 1/κ times the live std. 0 lifts the guard.

        `held` is the fraction of the gradient along the divided vectors that frozen sites hold back. In training, what
        some tokens read there is lengthened by factors from 1 to `noise`.

        Call this before `advance`: no norm becomes constant while there is a guard.
        """
        self.least = least
        for norm in self.norms:
            norm.guards, norm.noise = True, noise
            for divisor in norm.divisors:
                divisor.least.fill_(least)
                divisor.held.fill_(held)

    def spread(
        self, of: Bool[Tensor, " batch"] | None = None, live: bool = False, position_0: float = 1.0
    ) -> tuple[Float[Tensor, "site batch pos"], Float[Tensor, "site _ _"], Float[Tensor, "site _ _"]]:
        """Return the live stds of the last forward, their targets, and the weight of each.

        If `live` is False, the targets are the constants that replace the stds, and a site's weight is its α. If `live`
        is True, all sites have weight 1, and the target of every token is the typical std of ordinary tokens
        (`Divisor.typical`). Only tokens of the sequences `of` count (None: all sequences), and those at position 0 are
        weighted by `position_0`. See `objective.spread_loss`.
        """
        of_site = [(norm.live_std, divisor) for norm in self.norms for divisor in norm.divisors]
        stds = torch.stack([std for std, _ in of_site])
        if live:
            aims = torch.stack([divisor.typical()[0] for _, divisor in of_site]).view(-1, 1, 1)
            weights = (~aims.isnan()).to(aims)  # nothing is known before the first step
            aims = aims.nan_to_num(1.0)
        else:
            aims = torch.stack([divisor.constants()[self.classes.index] for _, divisor in of_site])
            weights = torch.stack([divisor.alpha for _, divisor in of_site]).view(-1, 1, 1)
        if of is not None:
            weights = weights * of.view(-1, 1)
        if position_0 != 1:
            weights = weights * torch.where(torch.arange(stds.shape[-1], device=stds.device) == 0, position_0, 1.0)
        return stds, aims, weights

    @torch.no_grad()
    def excess(self) -> Float[Tensor, "site batch pos"]:
        """Return the live stds of the last forward divided by the unguarded scales. The ratio is 1 at a live site."""
        classes = self.classes.index
        stds = [norm.live_std.detach().unsqueeze(-1) for norm in self.norms for _ in norm.divisors]
        scales = [
            divisor.scale(std, classes, False) for std, divisor in zip(stds, self._divisors.values(), strict=True)
        ]
        return (torch.cat(stds, -1) / torch.cat(scales, -1)).movedim(-1, 0)

    @torch.no_grad()
    def observe(self, of: Bool[Tensor, " batch"] | None = None, keep: bool = False) -> None:
        """Record the live stds of the last forward. Call once per micro-batch, however often it was recomputed.

        Only the sequences `of` are recorded (None: all). If `keep`, they are also kept for `largest_over_constants`.
        """
        to_mean, _ = STD_MEANS[self._std_mean]
        live = torch.stack([norm.live_std.detach() for norm in self.norms])
        stds = to_mean(live)
        if keep:
            self._kept.append((live, self.classes.index))
        members = [self.classes.index == c for c in range(len(CLASSES))]
        if of is not None:
            members = [member & of.unsqueeze(-1) for member in members]
        sums = torch.stack([(stds * member).sum((1, 2)) for member in members], dim=-1)
        counts = torch.stack([member.sum() for member in members])
        self._observed.append(torch.cat([sums, counts.unsqueeze(0)]))

    @torch.no_grad()
    def update(self, decay: float) -> Float[Tensor, "sites 3"]:
        """Update the running means with the stds that all processes observed. Call once per optimizer step.

        Returns the mean live std of each site by token class; NaN if there were no tokens of the class.
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
        """Bring every site to its state in `events` at `step`. Return the events that begin at this step.

        Call at the beginning of every step, in order. Once the last event is complete, the norms become constant.
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
        complete = whole and not self.least and all(step >= event.end for event in events)
        began = [event.name for event in events if event.step <= step and event.phase not in get_args(TokenClass)]
        self._begun |= {self._divisors[name] for name in began}
        for norm in self.norms:
            if norm.has_readers:
                norm.live, norm.constant = self._begun.isdisjoint(norm.divisors), complete
        return [event for event in events if event.step == step]

    @torch.no_grad()
    def largest_over_constants(self) -> Float[Tensor, "sites 2"]:
        """Return the 99.9th percentile and the maximum, over the kept tokens, of live std divided by constant.

        At a live site, the running mean takes the place of the constant. With several processes, each is the maximum
        over the processes.
        """
        found = []
        for i, norm in enumerate(self.norms):
            for divisor in norm.divisors:
                typical = divisor.typical()
                ratios = torch.cat([(live[i] / typical[classes]).flatten() for live, classes in self._kept])
                found.append(torch.stack([ratios.quantile(0.999), ratios.max()]))
        self._kept.clear()
        largest = torch.stack(found)
        if dist.is_initialized():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest

    def largest_stds(self) -> dict[str, float]:
        """Return the largest live std, or RMS, of the last forward at each site."""
        stds = [norm.live_std.max().item() for norm in self.norms for _ in norm.divisors]
        return dict(zip(self, stds, strict=True))

    def constants(self) -> Float[Tensor, "sites 3"]:
        """Return the constant of each site by token class."""
        return torch.stack([divisor.constants() for divisor in self._divisors.values()])

    @torch.no_grad()
    def to_plain(self) -> PreTrainedModel:
        """Return an ordinary model: with live norms if no site is frozen, LN-free (format b25) if all sites are.

        Raises:
            CheckpointError: only some sites are frozen, or a token class is not merged.
        """
        own = [CLASSES.index(name) for name in self.classes.own]
        begun = {name for name, divisor in self._divisors.items() if divisor.alpha > 0 or divisor.merged.any()}
        frozen = {name for name, divisor in self._divisors.items() if divisor.alpha == 1 and divisor.merged[own].all()}
        if begun and frozen != set(self._divisors):
            raise CheckpointError(
                f"These sites are not yet frozen and merged: {', '.join(name for name in self if name not in frozen)}. "
                "The model is neither LN-free nor an ordinary one: continue training to the end of its schedule."
            )
        # Copies, so that freezing below leaves this model unchanged.
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items() if ".divisors." not in name}
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
