"""What the configurations of all data sets share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

FilePath = Annotated[Path, Field(strict=False)]  # a YAML file can only say a path as a string


class DataSettings(BaseModel):
    """The base of every data set's configuration: a key it does not know is an error, and so is a wrong type.

    Attributes:
        evaluate_on: What is kept out of training and evaluated: the test part, or, to choose hyper-parameters, a fifth
            of the training part; the test part is then not touched at all.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    evaluate_on: Literal["test", "validation"] = "test"
