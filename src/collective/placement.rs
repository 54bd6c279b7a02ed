//! How a launcher started this process, read from the variables that the launcher set.

use std::str::FromStr;

use super::slurm;
use crate::error::{Error, Result};

/// The transport that connects the ranks of a world at start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Launch {
    /// MPI if a known launcher started this process, otherwise a world of one.
    #[default]
    Auto,
    /// MPI, also under a launcher that this module does not know.
    Mpi,
    /// TCP, for clusters on which MPI cannot be started.
    Tcp,
}

impl FromStr for Launch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Launch::Auto),
            "mpi" => Ok(Launch::Mpi),
            "tcp" => Ok(Launch::Tcp),
            _ => Err("expected auto, mpi or tcp".into()),
        }
    }
}

/// Result of looking for a launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// No launcher: a world of one that needs no MPI.
    Alone,
    /// `size` is the launcher's number of tasks; `None` if the launcher sets a rank but no size.
    Launched { size: Option<usize> },
}

/// This process's rank, and the address at which the ranks meet over TCP.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TcpPlacement {
    pub rank: usize,
    pub world_size: usize,
    /// `host:port` of rank 0.
    pub rendezvous: String,
}

/// Beginnings of the names of variables by which launchers place a process in a world: those of
/// Open MPI and its runtime, PMI and PMIx, Slurm, Hydra, PALS, and our own.
const LAUNCHERS: [&str; 10] =
    ["OMPI_", "PRTE_", "PMIX_", "PMI_", "PMI2_", "SLURM_", "HYDRA_", "MPI_", "PALS_", "FM_DIST_"];

/// True for the name of a variable that a launcher sets for its processes.
pub(super) fn is_launchers(name: &str) -> bool {
    LAUNCHERS.iter().any(|beginning| name.starts_with(beginning))
}

/// Looks for a launcher in the variables that `variable` returns.
///
/// # Errors
/// [`Error::Environment`] if a launcher's variable does not hold a number.
pub(super) fn placement_among(variable: impl Fn(&str) -> Option<String>) -> Result<Placement> {
    let launched = launched_among(&variable)?;
    // The only task of a step has no peers, and MPI would not start without a PMI.
    let is_alone = launched == Placement::Launched { size: Some(1) } && lacks_a_pmi(&variable);
    Ok(if is_alone { Placement::Alone } else { launched })
}

fn launched_among(variable: impl Fn(&str) -> Option<String>) -> Result<Placement> {
    // mpirun inside a Slurm job inherits Slurm's variables, so the innermost launcher is looked up
    // first.
    let mut names = vec!["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];
    if is_slurm_task(&variable) {
        names.extend(["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"]);
    }
    match number(&variable, &names)? {
        Some(size) => Ok(Placement::Launched { size: Some(size as usize) }),
        None if variable("PMIX_RANK").is_some() => Ok(Placement::Launched { size: None }),
        None => Ok(Placement::Alone),
    }
}

/// Returns the rank that the innermost launcher gave this process. Values that are not numbers are
/// skipped.
pub(super) fn rank_among(variable: impl Fn(&str) -> Option<String>) -> Option<usize> {
    let mut names =
        vec!["FM_DIST_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PALS_RANKID"];
    if is_slurm_task(&variable) {
        names.push("SLURM_PROCID");
    }
    names.iter().find_map(|name| variable(name)?.parse().ok())
}

/// Returns the value of the first of these variables that is set.
fn number(variable: impl Fn(&str) -> Option<String>, names: &[&str]) -> Result<Option<u64>> {
    let Some((name, text)) = names.iter().find_map(|name| Some((name, variable(name)?))) else {
        return Ok(None);
    };
    let number = text.parse().map_err(|_| {
        Error::environment(format!("{name}={text:?} is no number; was it set by hand?"))
    })?;
    Ok(Some(number))
}

/// True if srun started this process. A batch script and an interactive shell have SLURM_PROCID and
/// SLURM_NTASKS too, but no step id, or one that Slurm reserves (from 0xfffffff0 on).
fn is_slurm_task(variable: impl Fn(&str) -> Option<String>) -> bool {
    let step = variable("SLURM_STEP_ID").and_then(|id| id.parse::<u32>().ok());
    variable("SLURM_PROCID").is_some() && step.is_some_and(|id| id < 0xffff_fff0)
}

/// True if srun started this task without a PMI through which it could find its peers. Open MPI
/// would then exit from its initialization with code 1 and a page of text, and other builds would
/// make each task a world of one.
pub(super) fn lacks_a_pmi(variable: impl Fn(&str) -> Option<String>) -> bool {
    let ways = ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PALS_RANKID"];
    is_slurm_task(&variable) && ways.iter().all(|name| variable(name).is_none())
}

/// Returns rank, world size and rendezvous for `--launch tcp`: `FM_DIST_RANK`, `FM_DIST_WORLD_SIZE`
/// and `FM_DIST_RENDEZVOUS` if set, otherwise from srun's variables of the step.
///
/// # Errors
/// [`Error::Environment`] that names the missing variable.
pub(super) fn tcp_placement_among(
    variable: impl Fn(&str) -> Option<String>,
) -> Result<TcpPlacement> {
    let is_slurm = is_slurm_task(&variable);
    let required = |own: &'static str, slurm_names: &[&'static str]| {
        let names: Vec<&str> =
            [own].into_iter().chain(slurm_names.iter().copied().filter(|_| is_slurm)).collect();
        let missing = || {
            Error::environment(format!(
                "--launch tcp: start it with srun, or set {own} for each process"
            ))
        };
        number(&variable, &names)?.ok_or_else(missing)
    };
    let rank = required("FM_DIST_RANK", &["SLURM_PROCID"])? as usize;
    let world_size =
        required("FM_DIST_WORLD_SIZE", &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"])? as usize;
    if rank >= world_size {
        return Err(Error::environment(format!(
            "--launch tcp: there is no rank {rank} among {world_size}; ranks count from 0"
        )));
    }
    let rendezvous = match variable("FM_DIST_RENDEZVOUS") {
        Some(rendezvous) => checked_rendezvous(rendezvous)?,
        None if is_slurm => step_rendezvous(&variable)?,
        None => {
            return Err(Error::environment(
                "--launch tcp: set FM_DIST_RENDEZVOUS=host:port, where rank 0 can be reached",
            ));
        }
    };
    Ok(TcpPlacement { rank, world_size, rendezvous })
}

fn checked_rendezvous(rendezvous: String) -> Result<String> {
    let parts = rendezvous.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>()));
    match parts {
        Some((host, Ok(1..))) if !host.is_empty() => Ok(rendezvous),
        _ => Err(Error::environment(format!(
            "FM_DIST_RENDEZVOUS={rendezvous:?} is no host:port, like n1:29500 or [fe80::1]:29500"
        ))),
    }
}

/// Returns the rendezvous of a Slurm step: rank 0 runs on the step's first host unless the user
/// placed it elsewhere, and the port follows from the ids of job and step.
fn step_rendezvous(variable: impl Fn(&str) -> Option<String>) -> Result<String> {
    let instead = "or set FM_DIST_RENDEZVOUS=host:port";
    let lists = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"];
    let list = lists.iter().find_map(|name| variable(name));
    let list = list.ok_or_else(|| {
        Error::environment(format!(
            "--launch tcp: no {} to find rank 0 in; use srun, {instead}",
            lists.join(", no ")
        ))
    })?;
    let host = slurm::hosts(&list).and_then(|hosts| hosts.into_iter().next());
    let host = host.ok_or_else(|| {
        Error::environment(format!("--launch tcp: {list:?} is no list of hosts; {instead}"))
    })?;
    let required = |name: &'static str| {
        number(&variable, &[name])?.ok_or_else(|| {
            Error::environment(format!(
                "--launch tcp: no {name} to make a port of; use srun, {instead}"
            ))
        })
    };
    Ok(format!("{host}:{}", slurm::port(required("SLURM_JOB_ID")?, required("SLURM_STEP_ID")?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(variables: &[(&str, &str)]) -> Result<Placement> {
        placement_among(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn every_variable_that_places_a_rank_is_a_launchers_and_no_other() {
        for (name, _) in STEP {
            assert!(is_launchers(name), "{name}");
        }
        for name in ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PALS_RANKID", "FM_DIST_RANK"]
        {
            assert!(is_launchers(name), "{name}");
        }
        for name in ["PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "HOME"] {
            assert!(!is_launchers(name), "{name}");
        }
    }

    #[test]
    fn without_a_launcher_the_process_is_alone() {
        assert_eq!(placed(&[]).unwrap(), Placement::Alone);
    }

    #[test]
    fn each_launcher_says_how_many_tasks_there_are() {
        let eight = Placement::Launched { size: Some(8) };
        assert_eq!(placed(&[("OMPI_COMM_WORLD_SIZE", "8")]).unwrap(), eight);
        assert_eq!(placed(&[("PMI_SIZE", "8")]).unwrap(), eight);
        assert_eq!(
            placed(&[("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0"), ("SLURM_STEP_ID", "0")])
                .unwrap(),
            eight
        );
        assert_eq!(placed(&[("PMIX_RANK", "3")]).unwrap(), Placement::Launched { size: None });
    }

    #[test]
    fn the_only_task_of_a_step_is_alone_unless_a_pmi_connects_it() {
        let task = [("SLURM_PROCID", "0"), ("SLURM_STEP_ID", "0"), ("SLURM_NTASKS", "1")];
        assert_eq!(placed(&task).unwrap(), Placement::Alone);
        let of_a_large_job = [
            ("SLURM_PROCID", "0"),
            ("SLURM_STEP_ID", "3"),
            ("SLURM_NTASKS", "8"),
            ("SLURM_STEP_NUM_TASKS", "1"),
        ];
        assert_eq!(placed(&of_a_large_job).unwrap(), Placement::Alone);
        let one = Placement::Launched { size: Some(1) };
        for way in [("PMIX_RANK", "0"), ("PMI_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")] {
            assert_eq!(placed(&[&task[..], &[way]].concat()).unwrap(), one, "{way:?}");
        }
    }

    #[test]
    fn a_batch_shell_is_no_task_of_a_step() {
        let batch = [("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0")];
        assert_eq!(placed(&batch).unwrap(), Placement::Alone);
        // Slurm's own steps: the batch script (…fb) and salloc's interactive shell (…fa).
        for step in ["4294967291", "4294967290"] {
            assert_eq!(
                placed(&[batch[0], batch[1], ("SLURM_STEP_ID", step)]).unwrap(),
                Placement::Alone
            );
        }
    }

    #[test]
    fn the_nearer_launcher_counts() {
        let nested = [
            ("SLURM_NTASKS", "2"),
            ("SLURM_PROCID", "0"),
            ("SLURM_STEP_ID", "1"),
            ("OMPI_COMM_WORLD_SIZE", "16"),
        ];
        assert_eq!(placed(&nested).unwrap(), Placement::Launched { size: Some(16) });
        let small_step = [
            ("SLURM_NTASKS", "8"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_PROCID", "0"),
            ("SLURM_STEP_ID", "1"),
        ];
        assert_eq!(placed(&small_step).unwrap(), Placement::Launched { size: Some(2) });
    }

    #[test]
    fn a7_tasks_that_no_pmi_connects_are_known_before_mpi_begins() {
        let lacks = |variables: &[(&str, &str)]| {
            lacks_a_pmi(|name| {
                variables
                    .iter()
                    .find(|(known, _)| *known == name)
                    .map(|(_, value)| value.to_string())
            })
        };
        let task = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2"), ("SLURM_STEP_ID", "0")];
        assert!(lacks(&task));
        for way in ["PMIX_RANK", "PMI_RANK", "PALS_RANKID", "OMPI_COMM_WORLD_SIZE"] {
            assert!(!lacks(&[&task[..], &[(way, "0")]].concat()), "{way}");
        }
        assert!(!lacks(&task[..2]), "a batch script is no task");
    }

    #[test]
    fn a_size_that_is_no_number_is_an_error_of_the_environment() {
        let error = placed(&[("PMI_SIZE", "many")]).unwrap_err();
        assert_eq!(error.exit_code(), 52);
        assert!(error.to_string().contains("PMI_SIZE=\"many\""), "{error}");
    }

    fn tcp_placement(variables: &[(&str, &str)]) -> Result<TcpPlacement> {
        tcp_placement_among(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string())
        })
    }

    const STEP: [(&str, &str); 6] = [
        ("SLURM_PROCID", "3"),
        ("SLURM_NTASKS", "8"),
        ("SLURM_STEP_ID", "2"),
        ("SLURM_JOB_ID", "4711"),
        ("SLURM_JOB_NODELIST", "n[01-04]"),
        ("SLURM_STEP_NUM_TASKS", "4"),
    ];

    #[test]
    fn srun_says_all_that_ranks_need_to_meet() {
        let found = tcp_placement(&STEP).unwrap();
        assert_eq!(
            found,
            TcpPlacement {
                rank: 3,
                world_size: 4,
                rendezvous: format!("n01:{}", slurm::port(4711, 2))
            }
        );
        let on_a_part = [&STEP[..], &[("SLURM_STEP_NODELIST", "n[03-04]")]].concat();
        assert!(tcp_placement(&on_a_part).unwrap().rendezvous.starts_with("n03:"));
    }

    #[test]
    fn the_own_variables_win() {
        let own = [
            ("FM_DIST_RANK", "0"),
            ("FM_DIST_WORLD_SIZE", "2"),
            ("FM_DIST_RENDEZVOUS", "[::1]:29500"),
        ];
        let expected = TcpPlacement { rank: 0, world_size: 2, rendezvous: "[::1]:29500".into() };
        assert_eq!(tcp_placement(&own).unwrap(), expected);
        assert_eq!(tcp_placement(&[&STEP[..], &own].concat()).unwrap(), expected);
    }

    #[test]
    fn what_is_missing_for_a_meeting_is_named() {
        let own = [
            ("FM_DIST_RANK", "0"),
            ("FM_DIST_WORLD_SIZE", "2"),
            ("FM_DIST_RENDEZVOUS", "n1:29500"),
        ];
        let without = |name: &str| {
            STEP.iter().copied().filter(|(known, _)| *known != name).collect::<Vec<_>>()
        };
        let replaced = |name, value| {
            own.iter()
                .map(|&(known, old)| (known, if known == name { value } else { old }))
                .collect::<Vec<_>>()
        };
        let cases = [
            (vec![], "start it with srun, or set FM_DIST_RANK"),
            (own[..1].to_vec(), "set FM_DIST_WORLD_SIZE"),
            (own[..2].to_vec(), "set FM_DIST_RENDEZVOUS=host:port"),
            // A batch script is not a step, whatever variables it inherits.
            (without("SLURM_STEP_ID"), "start it with srun"),
            (without("SLURM_JOB_ID"), "no SLURM_JOB_ID to make a port of"),
            (without("SLURM_JOB_NODELIST"), "no SLURM_STEP_NODELIST, no SLURM_JOB_NODELIST"),
            (replaced("FM_DIST_RANK", "2"), "no rank 2 among 2"),
            (replaced("FM_DIST_RANK", "-1"), "FM_DIST_RANK=\"-1\" is no number"),
            (replaced("FM_DIST_RENDEZVOUS", "n1"), "no host:port"),
            (replaced("FM_DIST_RENDEZVOUS", "n1:0"), "no host:port"),
            (replaced("FM_DIST_RENDEZVOUS", ":29500"), "no host:port"),
        ];
        for (variables, words) in cases {
            let error = tcp_placement(&variables).unwrap_err();
            assert_eq!(error.exit_code(), 52);
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn a_launch_is_one_of_three() {
        assert_eq!("tcp".parse(), Ok(Launch::Tcp));
        assert_eq!("gloo".parse::<Launch>(), Err("expected auto, mpi or tcp".to_string()));
    }
}
