"""Draws receipt.png, the picture that `make demo` asks about. Run it beside the picture: python make_receipt.py."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

LINES = (("Coffee", "3.20"), ("Bread", "2.45"), ("Apples", "4.10"), ("Cheese", "6.75"))
TOTAL = "16.50"


def main() -> None:
    """Write receipt.png beside this file: 384 x 512 pixels, 16 grey levels."""
    picture = Image.new("L", (384, 512), 255)
    draw = ImageDraw.Draw(picture)
    large, small = ImageFont.load_default(30), ImageFont.load_default(24)
    draw.text((192, 48), "CORNER MARKET", font=large, fill=0, anchor="mm")
    draw.text((192, 92), "2026-03-14  10:24", font=small, fill=80, anchor="mm")
    draw.line((32, 124, 352, 124), fill=0, width=2)
    for row, (name, price) in enumerate(LINES):
        draw.text((40, 160 + 48 * row), name, font=small, fill=0, anchor="lm")
        draw.text((344, 160 + 48 * row), price, font=small, fill=0, anchor="rm")
    draw.line((32, 352, 352, 352), fill=0, width=2)
    draw.text((40, 390), "TOTAL", font=large, fill=0, anchor="lm")
    draw.text((344, 390), TOTAL, font=large, fill=0, anchor="rm")
    draw.text((192, 464), "Thank you!", font=small, fill=80, anchor="mm")
    picture.quantize(16).save(Path(__file__).with_name("receipt.png"), optimize=True)


if __name__ == "__main__":
    main()
