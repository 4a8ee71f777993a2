"""A dialogue about at most one image, which is saved and loaded with it."""

from __future__ import annotations

from pathlib import Path

from infer.answerer import ImageAnswerer
from infer.chat.dialogue import Dialogue
from infer.chat.transcript import Transcript
from llava_core.language.compiled_decode import CompiledStep
from llava_core.language.sampling import Sampling
from llava_core.network.fetch_limits import FetchLimits
from llava_core.vision.image_files import TYPED_LIMITS, is_url, not_an_image, read_image, untrusted_limits
from llava_core.vision.image_formats import ImageError
from llava_core.vision.preprocess import Decoded


class ImageDialogue(Dialogue):
    """Turns of one dialogue; `show` begins another one about a new image."""

    def __init__(
        self,
        aligned: ImageAnswerer,
        sampling: Sampling,
        *,
        compiled: CompiledStep | None = None,
        allow_private: bool = False,
    ) -> None:
        """`allow_private`: the image URL of a saved dialogue may lead to a private network."""
        super().__init__(aligned.llm, aligned.conversation, sampling, compiled=compiled)
        self.aligned, self.allow_private = aligned, allow_private
        self.image: str | None = None
        """Path or URL of the image."""
        self.decoded: Decoded | None = None
        """Its pixels."""

    def another(self) -> ImageDialogue:
        """A new dialogue with the same models and settings, about nothing yet."""
        return ImageDialogue(
            self.aligned, self.sampling, compiled=self.compiled, allow_private=self.allow_private
        )

    def show(self, image: str, limits: FetchLimits = TYPED_LIMITS) -> None:
        """Begin a dialogue about the image at a path or URL. Raises LlavaError and then changes nothing."""
        self.show_file(image, read_image(image, limits))

    def show_file(self, name: str, data: bytes) -> None:
        """As `show`, with the content of an image file and its name."""
        try:
            decoded = self.aligned.decode(data)
        except ImageError as error:
            raise not_an_image(name, error) from None
        self.show_decoded(name, decoded)

    def show_decoded(self, name: str, decoded: Decoded) -> None:
        """As `show_file`, with the pixels that the encoder takes."""
        self.begin(self.aligned.encode_images([decoded]))
        self.image, self.decoded = name, decoded

    def transcript(self) -> Transcript:
        """The dialogue as it is saved; a path is made absolute, so that it is found from any folder."""
        image = self.image
        if image is not None and not is_url(image):
            image = str(Path(image).expanduser().resolve())
        return Transcript(image, self.messages)

    def load(self, transcript: Transcript) -> None:
        """Continue a saved dialogue. Raises LlavaError, and changes nothing, if its image is gone."""
        if transcript.image is None:
            self.begin()
            self.image = self.decoded = None
        else:
            self.show(transcript.image, untrusted_limits(self.allow_private))
        self.messages += transcript.messages
