"""What a row of draft logits is taught: a loss and its slope, both in closed form.

For logits z and q = softmax(z), every loss here is a function of log q, so with the pull u_v = -dL / d log q_v

    dL/dz = (sum_v u_v) q - u

Let p be the target's distribution restricted to the draft vocabulary and p' the same renormalised, y a label,
a = sum_v min(p_v, q_v) the probability that a drafted token is accepted, m_v = 1 where q_v < p_v, else 0.

    kl         -sum p' log q, which is KL(p' || q) + entropy of p'     u = p'
    ce         -log q_y                                                u = 1 at y
    tv         1 - a                                                   u = m q, since a grows only where q is the smaller
    lk_alpha   -log a                                                  u = m q / a
    lk_lambda  c KL(p' || q) + (1 - c) (1 - a)                         u = c p' + (1 - c) m q
               with c = exp(-eta a), which is not differentiated

(LK losses: arXiv 2602.23881, with c per row, so that a row's gradient does not depend on its neighbours.) What p lacks to 1 lies
outside the draft vocabulary, where q is 0, so 1 - a is half the L1 distance of the two on all ids. lk_alpha is worked out from
logarithms: a may underflow, q / a does not, and the slope stays that of the formula at any distance of the two.

D-PACE (arXiv 2605.18810) weighs the rows k = 0, 1, ... of a block. With s_k = (1 - alpha) q_k(y_k) + alpha:

    prefix        P_k = s_0 s_1 ... s_k
    dpace         sum_{j >= k} P_j, the slope of sum_j P_j, the accepted length, by log s_k
    continuation  that divided by P_k

Shapes: N rows, D draft vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch


class Lesson(NamedTuple):
    """What rows are taught, as far as their objective asks for it."""

    target_ND: torch.Tensor | None = None
    """p', for kl."""
    log_target_ND: torch.Tensor | None = None
    """log p, for tv and the LK losses."""
    label_N: torch.Tensor | None = None
    """Draft ids, int64, for ce."""


class Slope(NamedTuple):
    loss_N: torch.Tensor
    gradient_ND: torch.Tensor
    """By the logits."""
    acceptance_N: torch.Tensor | None


class Pull(NamedTuple):
    """A loss, its pull u and the sum of u over D, and the acceptance a."""

    loss_N: torch.Tensor
    towards_ND: torch.Tensor
    mass_N: torch.Tensor
    acceptance_N: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of a row: the sum of factor times term. `pace` weighs the rows of `ce` by D-PACE."""

    kl: float = 0.0
    ce: float = 0.0
    tv: float = 0.0
    lk_alpha: float = 0.0
    lk_lambda: float = 0.0
    lk_eta: float = 3.0
    """How fast lk_lambda turns from KL to the acceptance as this grows."""
    pace: Literal["", "dpace", "prefix", "continuation"] = ""
    pace_alpha: float = 0.5
    """In (0, 1]: the share of a row's survival that does not depend on the draft."""

    @classmethod
    def named(cls, loss: str, *, lk_eta: float = 3.0, pace_alpha: float = 0.5) -> Self:
        """The objective of an option `loss`: a term, or dpace, dpace_prefix, dpace_continuation."""
        chosen: dict[str, Any] = {loss: 1.0}
        if loss.startswith("dpace"):
            chosen = {"ce": 1.0, "pace": loss.removeprefix("dpace_")}
        return cls(**chosen, lk_eta=lk_eta, pace_alpha=pace_alpha)

    @property
    def gives_acceptance(self) -> bool:
        return any((self.tv, self.lk_alpha, self.lk_lambda))

    @property
    def needs_teacher(self) -> bool:
        return bool(self.kl) or self.gives_acceptance

    @property
    def needs_label(self) -> bool:
        return bool(self.ce)

    def slope(self, logits_ND: torch.Tensor, draft_ND: torch.Tensor, log_normaliser_N: torch.Tensor, lesson: Lesson) -> Slope:
        """Loss and gradient of each row.

        Args:
            logits_ND: may be overwritten.
            draft_ND: their softmax, in the dtype in which everything is worked out; the gradient takes its place.
            log_normaliser_N: their logsumexp.
        """
        loss_N, mass_N = torch.zeros_like(log_normaliser_N), torch.full_like(log_normaliser_N, self.kl + self.ce)
        pulls, acceptance_N = list[tuple[float, torch.Tensor]](), None
        if lesson.label_N is not None:
            loss_N += self.ce * (log_normaliser_N - logits_ND.gather(1, lesson.label_N[:, None])[:, 0])
        if lesson.log_target_ND is not None:
            for factor, pull in self._pulls(logits_ND, draft_ND, log_normaliser_N, lesson.log_target_ND):
                loss_N += factor * pull.loss_N
                mass_N += factor * pull.mass_N
                pulls.append((factor, pull.towards_ND))
                acceptance_N = pull.acceptance_N
        if lesson.target_ND is not None:
            loss_N += self.kl * (log_normaliser_N - logits_ND.to(draft_ND.dtype).mul_(lesson.target_ND).sum(-1))
            pulls.append((self.kl, lesson.target_ND))
        if self.gives_acceptance or self.kl + self.ce != 1:
            draft_ND.mul_(mass_N[:, None])
        for factor, towards_ND in pulls:
            draft_ND.sub_(towards_ND, alpha=factor)
        if lesson.label_N is not None:
            label_N1 = lesson.label_N[:, None]
            draft_ND.scatter_(1, label_N1, draft_ND.gather(1, label_N1) - self.ce)
        return Slope(loss_N, draft_ND, acceptance_N)

    def _pulls(
        self, logits_ND: torch.Tensor, draft_ND: torch.Tensor, log_normaliser_N: torch.Tensor, log_target_ND: torch.Tensor
    ) -> list[tuple[float, Pull]]:
        pulls = []
        if self.tv:
            pulls.append((self.tv, total_variation(draft_ND, log_target_ND)))
        if self.lk_alpha or self.lk_lambda:
            log_draft_ND = logits_ND.to(draft_ND.dtype) - log_normaliser_N[:, None]
        if self.lk_alpha:
            pulls.append((self.lk_alpha, negative_log_acceptance(log_draft_ND, log_target_ND)))
        if self.lk_lambda:
            pulls.append((self.lk_lambda, kl_until_accepted(draft_ND, log_draft_ND, log_target_ND, self.lk_eta)))
        return pulls


def total_variation(draft_ND: torch.Tensor, log_target_ND: torch.Tensor) -> Pull:
    target_ND = log_target_ND.exp()
    acceptance_N = torch.minimum(draft_ND, target_ND).sum(-1)
    towards_ND = target_ND.gt_(draft_ND).mul_(draft_ND)
    return Pull(1 - acceptance_N, towards_ND, towards_ND.sum(-1), acceptance_N)


def negative_log_acceptance(log_draft_ND: torch.Tensor, log_target_ND: torch.Tensor) -> Pull:
    overlap_ND = torch.minimum(log_draft_ND, log_target_ND)
    log_acceptance_N = overlap_ND.logsumexp(-1)
    towards_ND = overlap_ND.sub_(log_acceptance_N[:, None]).exp_().mul_(log_draft_ND < log_target_ND)
    return Pull(-log_acceptance_N, towards_ND, towards_ND.sum(-1), log_acceptance_N.exp())


def kl_until_accepted(draft_ND: torch.Tensor, log_draft_ND: torch.Tensor, log_target_ND: torch.Tensor, eta: float) -> Pull:
    distance = total_variation(draft_ND, log_target_ND)
    share_N = torch.exp(-eta * distance.acceptance_N)
    log_target_ND = log_target_ND.log_softmax(-1)
    target_ND = log_target_ND.exp()
    kl_N = log_target_ND.sub_(log_draft_ND).mul_(target_ND).sum(-1)
    return Pull(
        torch.lerp(distance.loss_N, kl_N, share_N),
        distance.towards_ND.mul_(1 - share_N[:, None]).add_(target_ND.mul_(share_N[:, None])),
        torch.lerp(distance.mass_N, torch.ones_like(share_N), share_N),
        distance.acceptance_N,
    )


def pace_weights(kind: str, alpha: float, likelihood_BK: torch.Tensor, counted_BK: torch.Tensor) -> torch.Tensor:
    """D-PACE's weights [B, K] of B blocks of K rows.

    Args:
        kind: dpace, prefix or continuation.
        likelihood_BK: probability that the draft gives the row's label.
        counted_BK: bool; the other rows are certain to survive and not worth reaching.
    """
    survival_BK = torch.where(counted_BK, (1 - alpha) * likelihood_BK + alpha, 1.0)
    reached_BK = survival_BK.cumprod(-1)
    ahead_BK = (reached_BK * counted_BK).flip(-1).cumsum(-1).flip(-1)
    return {"prefix": reached_BK, "dpace": ahead_BK, "continuation": ahead_BK / reached_BK}[kind]
