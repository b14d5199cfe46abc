"""Print what the guarded paths cost here."""
import json
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
tests = types.ModuleType("tests")  # some distribution may bring a package of that name along
tests.__path__ = [str(ROOT / "tests")]
sys.modules["tests"] = tests
from tests.costs.paths import measure
print(json.dumps(measure(), indent=1))
