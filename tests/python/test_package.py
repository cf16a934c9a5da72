"""The package as a whole: import, versions, types."""

import pathlib
import shutil
import subprocess
import sys

import pytest

import qkv

FOLDER = pathlib.Path(qkv.__file__).parent


def python(program, **options):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, **options)


def test_import_is_short_and_needs_the_standard_library_alone():
    program = f"""
import sys, time
sys.path.insert(0, {str(FOLDER.parent)!r})
begin = time.process_time()
import qkv
took = time.process_time() - begin
assert took < 0.1, took
assert not {{"torch", "numpy", "jax", "cupy"}} & set(sys.modules), sys.modules.keys()
qkv.attention.Attention  # a submodule, when it is asked for
"""
    done = python(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("version", ["0.0.9", "9.9.9"])
def test_parts_of_two_versions_do_not_import(version, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "qkv")
    (tmp_path / "qkv" / "_version.py").write_text(f'version = "{version}"\n')
    done = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import qkv")
    assert "ImportError: qkv " + version in done.stderr and "reinstall" in done.stderr


def test_the_folder_may_be_moved(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "qkv")
    done = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import qkv; print(qkv.context('cpu').device_name, qkv.__file__)")
    assert done.stdout.startswith("cpu:") and str(tmp_path) in done.stdout, done.stderr


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nothing"):
        qkv.nothing
    assert "attention" in dir(qkv) and "rmsnorm" in dir(qkv)


def test_records_have_the_defaults_of_the_c_structures():
    assert qkv.Rope() == (0, False, 10000.0, 1.0, 0.0, 0.0, 0.0)
    assert qkv.Variant("a", "b").params == ()


def test_stubs_are_those_of_the_extension():
    pytest.importorskip("mypy")
    done = subprocess.run([sys.executable, "-m", "mypy.stubtest", "qkv._native"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
