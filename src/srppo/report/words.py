"""What the figures say, in plain words, and what to be wary of."""

from __future__ import annotations

from srppo.report.compare import difference
from srppo.report.plots import readable
from srppo.report.record import Record
from srppo.text import counted, percent
from srppo.titles import STAGES

EDGE = 5  # rounds at the beginning and the end over which a course is judged
MUCH_LONGER = 1.2


def findings(record: Record) -> list[str]:
    """Sentences: SRPPO against SFT and continued SFT, what was forgotten, length against reward."""
    details = [s for other in ("sft", "sft_continued") for group in record.groups for s in _against(record, group, other)]
    if not details:
        details = [f"There is nothing to compare yet: {record.titles['srppo']} and SFT have not both been evaluated with a scorer."]
    return details + _guarded(record) + _retention(record) + _course(record)


def verdict(record: Record) -> list[str]:
    """SRPPO against SFT, and against continued SFT, in a sentence each."""
    out = []
    for other in ("sft", "sft_continued"):
        found = [d for group in record.groups if (d := difference(record, group, "srppo", other))]
        if found:
            better, worse = (sum(d.clear and (d.gain > 0) == up for d in found) for up in (True, False))
            counts = [f"clearly better on {better}"] * bool(better) + [f"clearly worse on {worse}"] * bool(worse)
            rest = len(found) - better - worse
            counts += [f"no clear difference on {rest}"] * bool(rest)
            plural = "group" if len(found) == 1 else "groups"
            out.append(f"{record.titles['srppo']} against {record.titles[other]}, {len(found)} {plural} of prompts: {', '.join(counts)}.")
    return out


def _against(record: Record, group: str, other: str) -> list[str]:
    found = difference(record, group, "srppo", other)
    if found is None:
        return []
    here, there = record.results("srppo")[group], record.results(other)[group]
    if found.clear:
        verdict = "better, beyond the noise" if found.gain > 0 else "worse, beyond the noise"
    else:
        verdict = "no clear difference"
    budget = " (trained further with PPO's compute)" if other == "sft_continued" else ""
    return [
        f"{readable(group)}: {record.titles['srppo']} answers {percent(here['sampled'])} right, "
        f"{record.titles[other]}{budget} {percent(there['sampled'])}: {verdict} "
        f"({points(found.gain)} points, 95 % interval {points(found.low)} to {points(found.high)})."
    ]


def points(share: float) -> str:
    """0.153 as +15.3 (percentage points)."""
    return f"{100 * share:+.1f}".replace("-", "−")


def _guarded(record: Record) -> list[str]:
    """What the guard did to PPO, where it did anything."""
    told = record.summary.get("ppo_training")
    ppo = told if isinstance(told, dict) else {}
    rounds, kept = ppo.get("rounds"), ppo.get("kept_round")
    if not isinstance(rounds, int) or not isinstance(kept, int):
        return []
    planned = (record.config.get("ppo") or {}).get("iterations")
    done = [f"ended PPO after round {rounds} of {planned}"] if ppo.get("stopped_early") else []
    if kept == 0 < rounds:
        done.append(f"went back to the SFT model: no round was better, so the weights of {record.titles['srppo']} are the SFT model's own")
    elif kept < rounds:
        done.append(f"kept the policy of round {kept}, the best")
    elif ppo.get("kept_lost"):
        done.append("would have kept an earlier round's policy, whose weights were lost; the last one's are kept")
    return [f"By the probability of held-out demonstrations the guard {' and '.join(done)}."] if done else []


def _retention(record: Record) -> list[str]:
    out = []
    lost = record.summary.get("lost_and_gained") or {}
    for stage in STAGES:
        groups = [g for g in record.groups if (lost.get(stage) or {}).get(g, {}).get("base_right")]
        if groups:
            shares = ", ".join(f"{percent(lost[stage][g].get('lost'))} ({readable(g)})" for g in groups)
            out.append(f"Of the prompts that the base answers right (greedy), {record.titles[stage]} no longer does: {shares}.")
    forgot = record.summary.get("forgetting") or {}
    parts = [
        f"{record.titles[s]} {forgot[s]['nats_per_token']:.3f}" for s in STAGES if (forgot.get(s) or {}).get("nats_per_token") is not None
    ]
    if parts:
        out.append(
            "Likelihood of the base's own answers to other prompts, lost in nats a token (0 is nothing forgotten): "
            + ", ".join(parts)
            + "."
        )
    return out


def _course(record: Record) -> list[str]:
    reward, length = (_ends(record, key) for key in ("objective/scores", "completions/mean_length"))
    if reward is None or length is None:
        return []
    unit = "" if record.learned_reward else "nats "
    text = (
        f"Over {len(record.series('ppo', 'objective/scores')[0])} PPO iterations the reward went from {reward[0]:.2f} to {reward[1]:.2f} "
        f"{unit}a response and the mean length from {length[0]:.1f} to {length[1]:.1f} tokens"
    )
    correlation = _ends(record, "reward_length_correlation")
    if correlation is None:
        return [text + "."]
    size = abs(correlation[1])
    how = "hardly depends on length" if size < 0.2 else f"{'rises' if correlation[1] > 0 else 'falls'} with length"
    return [f"{text}; within a round the reward {how} (correlation {correlation[1]:+.2f} at the end).".replace("+-", "-")]


def _ends(record: Record, key: str) -> tuple[float, float] | None:
    """Means of a PPO metric over the first and the last rounds (a third of them, EDGE at most); None with fewer than two."""
    values = record.series("ppo", key)[1]
    if len(values) < 2:
        return None
    k = min(EDGE, max(1, len(values) // 3))
    return sum(values[:k]) / k, sum(values[-k:]) / k


def warnings(record: Record) -> list[str]:
    """What a reader should know before believing the figures."""
    return [w for check in (_endings, _small_groups, _sampling, _skipped, _cut, _length_bias, _over_optimised) for w in check(record)] + [
        str(w) for source in (record.summary, record.data) for w in (source.get("warnings") or [])
    ]


def _endings(record: Record) -> list[str]:
    return [
        f"{record.titles[s]} ends only {percent(r['eos_rate'], 0)} of its answers on {readable(g)}; the rest are cut at the length limit"
        for s in record.stages
        if s != "base"
        for g, r in record.results(s).items()
        if r.get("eos_rate") is not None and r["eos_rate"] < 0.9
    ]


def _small_groups(record: Record) -> list[str]:
    sizes = {g: r["n"] for s in record.stages for g, r in record.results(s).items() if r.get("n")}
    return [f"{readable(g)}: only {counted(n, 'evaluation prompt')}, so the figures are rough" for g, n in sizes.items() if n < 30]


def _sampling(record: Record) -> list[str]:
    rollout = record.config.get("rollout") or {}
    changed = [
        f"{k} {rollout[k]}" for k, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)) if rollout.get(k, neutral) != neutral
    ]
    return [f"Rollouts were sampled with {', '.join(changed)}: the PPO ratio and the KL are biased"] if changed else []


def _skipped(record: Record) -> list[str]:
    keys = (("sft", "skipped_steps"), ("sft_continued", "skipped_steps"), ("ppo", "policy/skipped_steps"), ("ppo", "critic/skipped_steps"))
    counts = [(stage, key, record.series(stage, key)[1]) for stage, key in keys]
    return [
        f"{int(max(n))} steps skipped for a NaN or infinite loss or gradient ({stage}: {key})"
        for stage, key, n in counts
        if n and max(n) > 0
    ]


def _cut(record: Record) -> list[str]:
    share = _ends(record, "completions/clipped_ratio")
    limit = (record.config.get("rollout") or {}).get("max_new_tokens")
    return [f"{percent(share[1], 0)} of the last rollouts were cut at {limit} tokens without EOS"] if share and share[1] > 0.1 else []


def _length_bias(record: Record) -> list[str]:
    length, correlation = _ends(record, "completions/mean_length"), _ends(record, "reward_length_correlation")
    if not length or not correlation or length[1] < MUCH_LONGER * length[0] or correlation[1] < 0.3:
        return []
    return [
        "Responses grow longer and longer ones earn more: length bias. reward.length_normalization, token_shift or token_clip are the cures"
    ]


def _over_optimised(record: Record) -> list[str]:
    reward = _ends(record, "objective/scores")
    if reward is None or reward[1] <= reward[0]:
        return []
    out = []
    for group in record.groups:
        values = record.series("ppo", f"eval/{group}/sampled")[1]
        if len(values) >= 3 and max(values) - values[-1] > 0.05:
            out.append(
                f"{readable(group)}: accuracy during PPO fell from {percent(max(values))} to {percent(values[-1])} while the reward rose: "
                "over-optimisation; use fewer iterations or a larger reward.kl_coef"
            )
    return out
