"""Questions, several at once, to the endpoint or to the answers that are there."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from saemill.common.errors import Interrupted
from saemill.common.log import counted, progress, say
from saemill.explain.answers import Answers
from saemill.explain.endpoint import Endpoint, EndpointError, Stopped

Request = dict[str, Any]
"""The body of a chat completion."""


@dataclass
class Asking:
    """Questions to the endpoint, and to the answers that are there."""

    endpoint: Endpoint
    answers: Answers
    at_once: int
    """Questions asked at the same time."""
    stop: threading.Event
    """Set to stop, by a signal or the first question that failed."""

    def ask(self, label: str, requests: Sequence[Request]) -> list[str]:
        """Ask several questions at once. Return the texts of the answers, in the order of the questions.

        Raises:
            EndpointError: the first that failed; what was answered meanwhile is kept.
            Interrupted: a signal came.
        """
        missing = [request for request in requests if self.answers.of(request) is None]
        with (
            ThreadPoolExecutor(self.at_once) as pool,
            progress(label, len(missing), "questions") as advance,
        ):
            asked = [pool.submit(self._one, request) for request in missing]
            try:
                for done in as_completed(asked):
                    done.result()
                    advance(1)
            except Stopped:
                pool.shutdown(cancel_futures=True)
                for failed in asked:
                    if not failed.cancelled() and isinstance(error := failed.exception(), EndpointError):
                        raise error from None
                raise Interrupted(f"stopped; answers so far are in {self.answers.path}") from None
            finally:
                for question in asked:
                    question.cancel()
        answers = [self.answers.of(request) or {} for request in requests]
        if n_cut := sum(answer["finish_reason"] == "length" for answer in answers):
            say(
                f"{label}: {n_cut:,} of {counted(len(answers), 'answer')} were cut off at their longest, as "
                "happens to models that think before they answer; give more --max-answer-tokens"
            )
        return [str(answer["content"]) for answer in answers]

    def _one(self, request: Request) -> None:
        try:
            self.answers.add(request, self.endpoint.ask(request))
        except EndpointError:
            self.stop.set()  # the others wait no longer
            raise

    def close(self) -> None:
        """Close the connections and the file."""
        self.endpoint.close()
        self.answers.close()
