"""Ask the small model inside the package about two pictures: drawn here, so that the answers are known."""

from PIL import Image, ImageDraw

import phi35


def picture(shape: str, color: str) -> Image.Image:
    """A 64x64 picture with one filled shape."""
    image = Image.new("RGB", (64, 64), (235, 240, 228))
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((16, 18, 44, 46), fill=color)
    else:
        draw.rectangle((14, 20, 48, 42), fill=color)
    return image


def main() -> None:
    """Three questions, one with tags that name the pictures."""
    images = [picture("circle", "red"), picture("rectangle", "blue")]
    for question in (
        "which image shows a red circle?",
        "do both images show the same shape?",
        "what differs between <|image_1|> and <|image_2|>?",
    ):
        print(question, "->", phi35.generate(prompt=question, images=images))


if __name__ == "__main__":
    main()
