"""What an evaluation compares with what. Plain values: nothing here loads numpy or torch."""

from typing import Literal

from pydantic import Field

from audiomae.config import StrictConfig, shown_as

Level = Literal["clip", "window"]


class ProtocolConfig(StrictConfig):
    """Which rows are queries, which are the gallery, and what is measured."""

    label: str = Field("label", description="column that says what is relevant", json_schema_extra=shown_as("COLUMN"))
    group: str | None = Field(
        None,
        description="column of folds; queries of one group search the others; null = leave-one-out",
        json_schema_extra=shown_as("COLUMN"),
    )
    query_groups: tuple[str, ...] | None = Field(
        None,
        description="only these groups are queries; null = all",
        json_schema_extra=shown_as("VALUE", "--query-group"),
    )
    level: Level = Field("clip", description="clip = mean over a file's windows; window = every window by itself")
    ks: tuple[int, ...] = Field((1, 5, 10), description="cut-offs of R@k, P@k and nDCG@k; R@1 is always among them")
    knn_k: int = Field(10, gt=0, description="neighbours that vote for kNN accuracy")
    max_queries: int = Field(
        20_000,
        gt=0,
        description="of a larger set only this many are queries, the same for every run; the gallery stays whole",
    )
    resamples: int = Field(2000, ge=100, description="how often the bootstrap and the permutation test draw")
    seed: int = Field(0, description="seed of sampling and resampling")

    def describe(self) -> str:
        """The protocol in one sentence, for the reader of a report."""
        unit = "clip (mean over its windows)" if self.level == "clip" else "window"
        if self.group is None:
            return f"Leave-one-out: each {unit} queries all the others; windows of one file never find each other."
        asked = f" {', '.join(self.query_groups)}" if self.query_groups else ""
        return f"Each {unit} of a {self.group}{asked} queries those of every other {self.group}."
