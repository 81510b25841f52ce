"""What a position of tokens is: a change of queries and keys, or a bias of the scores."""

from torch import nn

from visattn.core.similarity.definition import Similarity


class Position(nn.Module):
    """The base of all positions: ``forward(q, k, coordinates) -> q, k, bias``.

    Attributes:
        adds_to_scores: The position is one more term of a score, zero for prefix tokens; otherwise
            it changes queries and keys themselves.
    """

    adds_to_scores = True

    def widen(self, similarity: Similarity | None) -> Similarity | None:
        """Return the similarity that also reads the channels which the position appends, if any."""
        return similarity
