"""A directive that runs an example while the documentation is built, and shows code and picture."""

import runpy
import sys
from pathlib import Path
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Executed(SphinxDirective):
    """Run a script that leaves a matplotlib ``figure`` behind; an exception fails the build."""

    required_arguments = 1
    option_spec: ClassVar = {"alt": directives.unchanged_required, "no-code": directives.flag}

    def run(self) -> list[nodes.Node]:
        """Return the picture and, unless it is not asked for, the code below it."""
        name, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(name)
        script = Path(path)
        if str(script.parent) not in sys.path:
            sys.path.insert(0, str(script.parent))
        figure = runpy.run_path(path)["figure"]
        # Beside the built pages, which git and Sphinx leave out; Sphinx copies what is used.
        picture = Path(self.env.srcdir, "_build", "pictures", f"{script.stem}.png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=200)
        code = script.read_text("utf-8").split('"""\n', 2)[-1].strip()
        image = nodes.image(uri=f"/_build/pictures/{picture.name}", alt=self.options["alt"])
        if "no-code" in self.options:
            return [image]
        return [image, nodes.literal_block(code, code, language="python")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("executed", Executed)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
