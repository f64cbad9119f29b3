"""vLLM servers as a rollout engine: rows go to one or several servers over HTTP, weights and adapters through a folder all of them see.

A server is kept running. It loads new weights in place (vLLM's collective_rpc "reload_weights"), or a new LoRA adapter, and is asked
on every new connection which weights it has, so one that was restarted gets them again. A server that fails loses its rows to the others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from srppo.errors import ConfigError
from srppo.records import Rollout
from srppo.rollout.decode import unwrapped
from srppo.rollout.engine import EngineLost, Progress, Sampling
from srppo.rollout.record import Answer, check_lengths, gathered, position_limit
from srppo.rollout.vllm_deal import Answered, Deal, Failed, GivenUp, Said, pause_after
from srppo.rollout.vllm_handover import Handover, Wanted
from srppo.rollout.vllm_http import START, Connection, Gone
from srppo.rollout.vllm_served import AdapterRefused, Server

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from srppo.models.load import SpecialTokens

PATIENCE = 300.0  # seconds that all servers may be gone; starting one takes a minute or two
TICK = 0.5  # seconds between two looks whether the user wants to stop, where no answer comes


class VLLMServerEngine:
    """A RolloutEngine that asks vLLM servers.

    special: its EOS ids end a response, and nothing else does. urls: one server or several, which share the rows. rows: requests at
    once for each. folder: where weights are handed over, under the same path on every server's machine. patience: seconds that all
    servers may be gone. warn: is told of servers that fail and come back.
    """

    def __init__(
        self,
        special: SpecialTokens,
        urls: Sequence[str],
        rows: int,
        folder: str | Path,
        patience: float = PATIENCE,
        warn: Callable[[str], None] = lambda text: None,
    ):
        if rows < 1:
            raise ConfigError(f"rollout.batch_size is {rows}; at least one row is decoded at once")
        if not urls:
            raise ConfigError("rollout.server names no server; it looks like http://host:8000")
        self.special, self.rows, self.patience, self.warn = special, rows, patience, warn
        self.servers = [Server(url) for url in dict.fromkeys(urls)]
        self.handover = Handover(folder)
        self._lora = True  # until a server refuses an adapter

    @property
    def syncs(self) -> int:
        """How often weights or an adapter were handed over."""
        return self.handover.written

    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        prompt_index: Sequence[int] | None = None,
        on_progress: Progress | None = None,
    ) -> Rollout:
        """One response a row, in the order of the rows (see RolloutEngine). The record's tensors are on the CPU.

        on_progress is also called, with the same numbers, while no answer comes in: so a stop is not held up by servers that are gone.
        Raises DataError for an empty prompt or one that leaves no room, ModelError for NaN or infinite logits, ServerError for a
        server that refuses, EngineLost when none has answered for `patience` seconds.
        """
        assert len(prompts) == len(seeds) and (prompt_index is None or len(prompt_index) == len(prompts))
        model, limit = unwrapped(model), sampling.max_new_tokens
        rows = [tuple(p) for p in prompts]
        check_lengths([len(p) for p in rows], limit, position_limit(model.config))

        def ask() -> Rollout:
            wanted = self.handover.write(model, self._lora)
            answers = self._ask_all(wanted, rows, seeds, sampling, on_progress)
            return gathered(answers, rows, prompt_index, limit, self.special.eos_ids, on_progress)

        if not rows:
            return gathered([], rows, prompt_index, limit, self.special.eos_ids, None)
        try:
            out = ask()
        except AdapterRefused:
            self._lora = False  # from now on merged
            out = ask()
        self.handover.tidy()
        return out

    def close(self) -> None:
        """Remove the weights handed over. The servers keep what they hold."""
        self.handover.close()

    def _ask_all(
        self, wanted: Wanted, rows: list[tuple[int, ...]], seeds: Sequence[int], sampling: Sampling, on_progress: Progress | None
    ) -> Iterator[Answer]:
        """Rows as they are answered. Every server has its threads, which take the next row when they are free."""
        deal = Deal(len(rows), len(self.servers), self.patience)
        tokens = max(len(p) for p in rows) + sampling.max_new_tokens
        lines: list[Connection] = []

        def work(server: Server, line: Connection) -> None:
            try:
                while self._ready(deal, server, wanted, line, tokens) and (row := deal.take()) is not None:
                    try:
                        answer = server.ask(wanted, line, tokens, rows[row], seeds[row], sampling, self.special.eos_ids)
                        deal.answer(server.url, row, *answer)
                    except Gone as error:
                        pause = deal.hand_back(row, str(error))
                        deal.fails(server.url, str(error))
                        deal.wait(pause)
            except GivenUp as error:
                deal.fail(EngineLost(f"{error}. Is it running? It is started with: {START}. What is saved is kept: continue with --resume"))
            except BaseException as error:  # raised again by the main thread
                deal.fail(error)
            finally:
                line.close()

        each = min(self.rows, -(-len(rows) // len(self.servers)))
        for server in self.servers:
            for _ in range(each):
                lines.append(Connection(server.url))
                threading.Thread(target=work, args=(server, lines[-1]), daemon=True).start()
        done = 0
        try:
            while done < len(rows):
                match deal.next(TICK):
                    case Answered(row, ids, logprobs):
                        done += 1
                        yield row, ids, logprobs
                    case Said(text):
                        self.warn(text)
                    case Failed(error):
                        raise error
                    case None if on_progress is not None:
                        on_progress(done, len(rows))
        finally:
            deal.stop()
            for line in lines:
                line.hang_up()

    def _ready(self, deal: Deal, server: Server, wanted: Wanted, line: Connection, tokens: int) -> bool:
        """Whether the server holds what is wanted: looked at on a new connection, with growing pauses while it is gone.

        False when all rows are answered meanwhile. Raises GivenUp, and whatever no other try would change.
        """
        failures = 0
        while not line.open and not deal.over:
            try:
                server.bring(wanted, line, tokens)
                deal.works(server.url)
            except Gone as error:
                line.close()
                failures += 1
                deal.fails(server.url, str(error))
                deal.wait(pause_after(failures))
        return not deal.over
