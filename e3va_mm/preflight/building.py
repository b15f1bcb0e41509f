"""Why a framework cannot build a data set, in words."""

import os.path as osp
import traceback
from collections.abc import Mapping, Sequence
from itertools import pairwise
from json import JSONDecodeError
from typing import Any
from xml.etree import ElementTree

from mmengine.config import Config
from mmengine.fileio import load
from mmengine.registry import DATASETS, DefaultScope

from e3va_mm.preflight.classes import (
    check_categories,
    check_class_names,
    check_not_empty,
    check_same_classes,
)
from e3va_mm.preflight.evaluation import check_evaluator_files
from e3va_mm.preflight.problems import Problem, iter_datasets, raise_errors
from e3va_mm.preflight.reading import ReadDataset
from e3va_mm.utils import is_number


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(map(is_number, value))
    )


ANY = (lambda value: True, 'anything')
TEXT = (lambda value: isinstance(value, str) and value, 'a text')
SIZE = (lambda value: is_number(value) and value > 0, 'a number above zero')
# What the entries of a COCO file hold.
ENTRIES = {
    'images': dict(id=ANY, file_name=TEXT, height=SIZE, width=SIZE),
    'annotations': dict(
        **dict.fromkeys(('id', 'image_id', 'category_id'), ANY),
        bbox=(_is_box, 'four numbers: x, y, width, height'),
        area=(is_number, 'a number'),
    ),
    'categories': dict(id=ANY, name=TEXT),
}


def explain_data_failure(
    config: Config, modes: Sequence[str], cause: BaseException
) -> None:
    """Find out whether a failed start was the fault of a data set.

    The frameworks read annotations before any hook, and fail in their own
    words. Here each data set is built alone, so that the error can name it.

    Args:
        config (Config): The config of the run that failed.
        modes (Sequence[str]): Loops it has built: 'train', 'val', 'test'.
        cause (BaseException): What it failed with.

    Raises:
        DataError: If a data set cannot be read, is empty, or lacks classes.
        ConfigError: If its classes are not a sequence.
    """
    read, problems = {}, []
    with DefaultScope.overwrite_default_scope(config.get('default_scope')):
        for mode in modes:
            loader = config.get(f'{mode}_dataloader') or {}
            for option, each in iter_datasets(
                loader.get('dataset'), f'{mode}_dataloader.dataset'
            ):
                # An empty data set cannot be serialised.
                each = dict(each, pipeline=[], serialize_data=False)
                try:
                    built = DATASETS.build(each)
                except Exception as error:
                    problem = _explain(option, each, error)
                    problems += [problem] if problem else []
                else:
                    read[option] = ReadDataset(option, built, 0.0)
    for check in (
        check_class_names,
        check_categories,
        check_same_classes,
        check_not_empty,
        check_evaluator_files,
    ):
        problems.extend(check(config, read))
    raise_errors([p for p in problems if p.severity == 'error'], cause)


def _explain(option: str, config: dict, error: Exception) -> Problem | None:
    """Why a data set could not be built; None if its files are fine."""
    name = config.get('ann_file') or ''
    if not isinstance(name, str):
        return Problem(
            f'{option}.ann_file',
            f'{name!r}',
            'the path of one file',
            "Join several by dict(type='ConcatDataset', datasets=[...]).",
        )
    ann_file = osp.join(config.get('data_root') or '', name)
    advice = f'Check {option}.data_root, .data_prefix and .ann_file.'
    if isinstance(error, FileNotFoundError):
        missing = f'no such file or folder: {error.filename or error}'
        return Problem(option, missing, 'one that is there', advice)
    xml = _xml_of(error)
    option += '.ann_file'
    mend = 'Copy the file again, or correct it and write it again.'
    if xml:
        fault = xml_fault(xml)
        return fault and Problem(xml, fault[0], fault[1], mend)
    if '://' in ann_file or config.get('backend_args'):
        return None
    if name and not osp.exists(ann_file):
        # mmseg asserts that its list of images is there.
        return Problem(option, f'no such file: {ann_file}', 'a list', advice)
    if isinstance(error, (JSONDecodeError, UnicodeDecodeError)):
        fault = f'is not valid JSON: {error}', 'annotations in JSON'
    elif ann_file.endswith('.json'):
        lacking = error.args[0] if isinstance(error, KeyError) else None
        fault = coco_fault(load(ann_file), lacking)
    else:
        fault = None
    return fault and Problem(option, f'{ann_file} {fault[0]}', fault[1], mend)


def _xml_of(error: Exception) -> str | None:
    """The file that a reader of XML was at when it failed."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        info = frame.f_locals.get('img_info')
        if isinstance(info, Mapping) and 'xml_path' in info:
            return info['xml_path']
    return None


def xml_fault(path: str) -> tuple[str, str] | None:
    """What a file of VOC's format lacks, and what was expected."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        return f'is not a whole XML file: {error}', 'annotations in XML'
    size = root.find('size')
    wanted = [(size, 'size', ('width', 'height'))] if size is not None else []
    for i, each in enumerate(root.iterfind('object')):
        at = f'object {i + 1}'
        if each.find('name') is None:
            return f'{at} lacks <name>', 'the name of a class'
        box = each.find('bndbox')
        if box is None:
            return f'{at} lacks <bndbox>', 'a box'
        wanted.append((box, at, ('xmin', 'ymin', 'xmax', 'ymax')))
        if each.findtext('difficult', '0') not in ('0', '1'):
            wanted.append((each, at, ('difficult',)))
    for node, at, tags in wanted:
        for tag in tags:
            text = node.findtext(tag)
            try:
                float(text)
            except (TypeError, ValueError):
                found = f'has <{tag}>{text}' if text else f'lacks <{tag}>'
                return f'{at} {found}', 'a number'
    return None


def coco_fault(
    content: Any, lacking: str | None = None
) -> tuple[str, str] | None:
    """Find the first entry that no reader of COCO files can take.

    Args:
        content (Any): What the JSON file holds.
        lacking (str, optional): A key that a reader has missed.

    Returns:
        tuple[str, str], optional: What it is, to go on a sentence about the
        file, and what was expected; None if there is none.
    """
    if not isinstance(content, Mapping):
        return f'holds a {type(content).__name__}', f'a dict of {[*ENTRIES]}'
    for name, keys in ENTRIES.items():
        entries = content.get(name)
        if not isinstance(entries, list):
            return f'has no list {name!r}', f'the keys {[*ENTRIES]}'
        for place, entry in enumerate(entries):
            if not isinstance(entry, Mapping):
                return f'has {entry!r} at {name}[{place}]', 'a dict'
            at = f'{name}[{place}] (id {entry.get("id")})'
            for key, (is_good, what) in keys.items():
                if key not in entry and key == lacking:
                    return f'lacks the key {key!r} at {at}', what
                if key in entry and not is_good(entry[key]):
                    return f'has {key}={entry[key]!r} at {at}', what
        ids = sorted(str(entry.get('id')) for entry in entries)
        for one, other in pairwise(ids):
            if one == other:
                return f'has several {name} with the id {one}', 'one'
    return None
