from engine.api.authoring import lint as lint
from engine.api.authoring import mapping_files as mapping_files
from engine.api.looks import explain as explain
from engine.api.looks import inspect as inspect
from engine.api.looks import mappings as mappings
from engine.api.looks import view as view
from engine.api.outputs import clean as clean
from engine.api.outputs import environment as environment
from engine.api.outputs import kept as kept
from engine.api.parts import commit as commit
from engine.api.parts import part as part
from engine.api.plans import (
    load_plan as load_plan,
)
from engine.api.plans import (
    plan as plan,
)
from engine.api.plans import (
    plan_reshard as plan_reshard,
)
from engine.api.plans import (
    plan_reverse as plan_reverse,
)
from engine.api.plans import (
    save_plan as save_plan,
)
from engine.api.reviews import compare as compare
from engine.api.reviews import verify as verify
from engine.api.runs import (
    convert as convert,
)
from engine.api.runs import (
    iter_tensors as iter_tensors,
)
from engine.api.runs import (
    reshard as reshard,
)
from engine.api.runs import (
    reverse as reverse,
)
from engine.api.runs import (
    run_plan as run_plan,
)
from engine.api.serving import Model as Model
from engine.api.serving import open as open
from engine.api.serving import serve as serve
from engine.api.serving import virtual as virtual
from engine.discover.files import new_mapping as new_mapping
from engine.discover.inspect import find_mapping as find_mapping
from engine.errors import EngineError as EngineError
from engine.errors import EngineErrors as EngineErrors
from engine.explaining.codes import explain_code as explain_code
from engine.explaining.describe import describe_plan as describe_plan
from engine.language.format import format_mapping as format_mapping
from engine.language.layout_file import load_layout as load_layout
from engine.language.mapping_file import load_mapping as load_mapping
from engine.planning.reading import read_checkpoint as read_checkpoint
from engine.proving.committed import write_meanings as write_meanings
from engine.proving.mapping_diff import diff as diff
from engine.proving.prove import prove as prove
from engine.run.execute import Report as Report
from engine.serve.mount import mount as mount
