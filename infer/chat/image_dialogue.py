"""A dialogue about at most one image: shown, saved to a file, and loaded from one."""

from __future__ import annotations

from pathlib import Path

from infer.aligned_model import AlignedModel
from infer.chat.dialogue import Dialogue
from infer.chat.transcript import Transcript
from llava_core.language.sampling import Sampling
from llava_core.network.fetch_limits import FetchLimits
from llava_core.vision.image_files import TYPED_LIMITS, is_url, not_an_image, read_image, untrusted_limits
from llava_core.vision.preprocess import Decoded, ImageError


class ImageDialogue(Dialogue):
    """Turns of one dialogue; `show` begins another one about a new image."""

    def __init__(self, aligned: AlignedModel, sampling: Sampling) -> None:
        super().__init__(aligned.llm, aligned.conversation, sampling)
        self.aligned = aligned
        self.image: str | None = None
        """Path or URL of what is shown."""
        self.allow_private = False
        """The image address in a saved dialogue may be private."""

    def show(self, image: str, limits: FetchLimits = TYPED_LIMITS) -> Decoded:
        """Begin a dialogue about the image at a path or URL. Raises LlavaError and then changes nothing."""
        return self.show_file(image, read_image(image, limits))

    def show_file(self, name: str, data: bytes) -> Decoded:
        """As `show`, with the content of an image file and what to call it."""
        try:
            decoded = self.aligned.decode(data)
        except ImageError as error:
            raise not_an_image(name, error) from None
        self.begin(self.aligned.encode_images([decoded]))
        self.image = name
        return decoded

    def saved(self) -> Transcript:
        """A path is saved in full, so that it is found from any folder."""
        image = self.image
        if image is not None and not is_url(image):
            image = str(Path(image).expanduser().resolve())
        return Transcript(image, self.messages)

    def load(self, chat: Transcript) -> Decoded | None:
        """Go on with a saved dialogue. Raises LlavaError, and changes nothing, if its image is gone."""
        decoded = None
        if chat.image is None:
            self.begin(self.nothing())
            self.image = None
        else:
            decoded = self.show(chat.image, untrusted_limits(self.allow_private))
        self.messages = [*chat.messages]
        return decoded
