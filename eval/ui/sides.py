"""One of the two settings side by side: rule, policy, scale, steps, and a control for all else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from .controls import Method, Setting, guidance_text

HIGHEST_SCALE, MOST_STEPS = 20.0, 100


class Side:
    """Controls of one side, made from what the methods say of themselves.

    Args:
        methods: See `controls.methods`.
        title: "Left" or "Right".
        rule: Chosen in the beginning.
    """

    def __init__(self, methods: Mapping[str, Method], title: str, rule: str) -> None:
        self.methods, self.title = methods, title
        rules = [name for name, one in methods.items() if one.kind == "rule"]
        policies = [name for name, one in methods.items() if one.kind == "policy"]
        saved = [(f"{n} (this model's)", n) for n, one in methods.items() if one.kind == "saved"]
        with gr.Column(min_width=260, elem_id=title.lower()):
            gr.Markdown(f"### {title}")
            self.scale = gr.Slider(
                1, HIGHEST_SCALE, 7.5, step=0.5, label="Guidance scale", info="1 is no guidance"
            )
            self.steps = gr.Slider(1, MOST_STEPS, 20, step=1, label="Steps")
            self.rule = gr.Dropdown(
                rules,
                value=rule,
                label="Rule",
                info="how predictions combine",
                filterable=False,
                elem_id=f"{title.lower()}-rule",
            )
            self.policy = gr.Dropdown(
                [*((name, name) for name in policies), *saved],
                value="always",
                label="Policy",
                info="which predictions are evaluated",
                elem_id=f"{title.lower()}-policy",
                filterable=False,
            )
            self.controls: dict[str, list[Any]] = {}
            self.groups: dict[str, gr.Group] = {}
            for name, method in methods.items():
                shown = name in (rule, "always")
                with gr.Group(visible=shown) as self.groups[name]:
                    gr.Markdown(
                        f"**{name}** {method.summary}", elem_classes="summary", padding=True
                    )
                    self.controls[name] = [
                        control(one, f"{title.lower()}-{name}-{one.name}")
                        for one in method.settings
                    ]
        for chosen in (self.rule, self.policy):
            chosen.change(
                self._show,
                [self.rule, self.policy],
                list(self.groups.values()),
                show_progress="hidden",
                queue=False,
                api_visibility="private",
            )

    @property
    def inputs(self) -> list[Any]:
        """The components whose values `read` takes."""
        held = [one for name in self.methods for one in self.controls[name]]
        return [self.rule, self.policy, self.scale, self.steps, *held]

    def read(self, values: Sequence[Any]) -> tuple[str, float, int]:
        """Guidance as text, scale and steps, from the values of `inputs`.

        Raises:
            ValueError: a control holds nothing usable.
        """
        rule, policy, scale, steps, *rest = values
        if scale is None or steps is None:
            raise ValueError(f"{self.title}: scale or steps are empty: give a number")
        held, at = {}, 0
        for name, method in self.methods.items():
            held[name] = rest[at : at + len(method.settings)]
            at += len(method.settings)
        return guidance_text(self.methods, rule, policy, held), float(scale), int(steps)

    def _show(self, rule: str, policy: str) -> list[Any]:
        return [gr.update(visible=name in (rule, policy)) for name in self.methods]


def control(setting: Setting, elem_id: str) -> Any:
    """The component that asks for a setting, with that id in the page."""
    value = setting.shown
    common: dict[str, Any] = {
        "label": setting.name.replace("_", " "),
        "info": setting.help or None,
        "elem_id": elem_id,
    }
    match setting.kind:
        case "switch":
            return gr.Checkbox(value, **common)
        case "choice" | "fill":
            return gr.Dropdown(list(setting.choices), value=value, **common, filterable=False)
        case "list":
            known = f"{', '.join(setting.choices)}, ..." if setting.choices else "1, 0.8, ..."
            return gr.Textbox(value, **common, placeholder=known)
        case "whole":
            return gr.Number(value, **common, precision=0, placeholder="not set")
        case _:
            return gr.Number(value, **common, step=0.01, placeholder="no limit")
