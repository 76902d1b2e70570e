"""Draw a picture of the gallery on its own; without arguments, the README's.

    python docs/draw.py [method docs/method.png]

The method's picture takes a second. The others train first, on generated mosaics: about a minute
on 2 cores.
"""

import runpy
import sys
from pathlib import Path

name, path = sys.argv[1:] or ("method", "docs/method.png")
gallery = Path(__file__).parent / "gallery"
sys.path.insert(0, str(gallery))
figure = runpy.run_path(str(gallery / f"{name}.py"))["figure"]
figure.savefig(path, dpi=160, pil_kwargs={"optimize": True})
print(f"wrote {path}")
