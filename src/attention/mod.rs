//! Chooses the backend by which a run computes attention on GPUs: each candidate is tried on the
//! run's own cases, in a process of its own, and compared with the plain one.
//!
//! Backends have crashed, hung and computed NaN, depending on the GPU, the versions of libtorch and
//! cuDNN, the mask and the number of tokens. A crash leaves a process without a usable GPU, so a
//! trial runs in a child, before this process opens the GPU.
//!
//! | question | file |
//! |---|---|
//! | a run's cases: head width, kind, mask, number of tokens | `case.rs` |
//! | outcome of a trial | `outcome.rs` |
//! | errors and times of one case, measured in the child | `measure.rs` |
//! | the child's side: the hidden command | `child.rs` |
//! | starting a child and listening to it | `process.rs` |
//! | trying all candidates; the cache of outcomes | `trial.rs` |
//! | versions and models that outcomes depend on | `machine.rs` |
//! | the ranks' common choice | `decision.rs` |
//! | outcomes as a table | `table.rs` |

mod case;
mod child;
mod decision;
mod machine;
mod measure;
mod outcome;
mod process;
mod table;
mod trial;

pub use case::{Case, Precision, cases_of, standard_cases};
pub use child::{Request, answer};
pub use decision::{Decision, NodeReport, asked, common};
pub use machine::Machine;
pub use outcome::{Errors, Outcome, Tried};
pub use process::Limits;
pub use table::{lines, table};
pub use trial::{Findings, Trial, Unavailable};
