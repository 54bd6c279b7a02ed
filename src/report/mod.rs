//! The results of a run as pictures: charts, grids of samples, and the page that contains them.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod axis;
mod bars;
mod canvas;
mod charts;
mod grid;
mod history;
mod page;

pub use bars::Bars;
pub use charts::{Chart, Series};
pub use grid::{grid_png, write_grid};
pub use history::{HistoryCell, HistoryRow};
pub use page::{Figure, ReportData, write_report};
