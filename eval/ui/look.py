"""How the page looks: a theme without fonts from elsewhere, and a few rules of CSS."""

from __future__ import annotations

import gradio as gr

CSS = """
.gradio-container { max-width: 1500px !important; margin: 0 auto !important; width: 100%; }
#title h1 { margin: 0; }
#title p { margin: 0; opacity: .75; }
.figures table { width: 100%; margin: 0; border-collapse: collapse; border: 0 !important; }
.figures tr { border: 0 !important; }
.figures td, .figures th {
  padding: 4px 10px !important; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important;
}
.figures td:not(:first-child), .figures th:not(:first-child) {
  text-align: right !important; font-variant-numeric: tabular-nums;
}
.progress { display: flex; gap: 10px; align-items: center; min-height: 24px; }
.progress progress { flex: 1; height: 8px; accent-color: var(--color-accent); }
.report {
  width: 100%; height: 80vh; border: 1px solid var(--border-color-primary); border-radius: 8px;
}
.summary { background: var(--block-background-fill) !important; }
.summary p { margin: 0; opacity: .75; font-size: .9em; }
@media (max-width: 760px) { #picture { order: -1; } }
"""


def theme() -> gr.themes.Base:
    """Gradio's default theme with the fonts of the system."""
    return gr.themes.Default(
        primary_hue="teal",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
