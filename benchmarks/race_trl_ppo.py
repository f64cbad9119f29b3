"""PPO against TRL 1.12.0's PPOTrainer, the last TRL had, side by side on this machine. One command:

python -m benchmarks.race_trl_ppo [--shapes default smollm2] [--tunings full lora] [--updates 4] [--turns 2] [--quick]

Both sides get the same weights, prompts, reward and settings, one thread and float32, and run in processes of their own, in turn.
Writes benchmarks/results/race_trl_ppo.json and docs/results/speed.md. Needs trl 1.12.0 (the dev extra).
"""

from __future__ import annotations

from benchmarks.race import sides

from srppo.models.compiled import compiles_adapters

NAME = "race_trl_ppo"
PEERS = {
    # lora: what TRL's peft_config gives, an adapter on the policy beside a critic that is trained whole. thrifty: see race/trl_ppo.py
    "full": sides.Peer("trl_ppo", ("full", "full_thrifty"), options=("compile", "least_squares")),
    "lora": sides.Peer("trl_ppo", ("lora", "lora_thrifty"), options=(*(["compile"] if compiles_adapters() else []), "least_squares")),
}


def main() -> None:
    sides.race_all(NAME, sides.options(__doc__, NAME), PEERS, samples=1, packages={"trl": "1.12.0"})


if __name__ == "__main__":
    main()
