//! Slurm's host lists, and a port derived from a job step.

/// Most hosts that a list is expanded to; a list that names more is treated as invalid.
const MOST_HOSTS: usize = 1 << 16;

/// First port and number of ports to choose from: above the ports of services and below the
/// ephemeral ports, which start at 32768.
const FIRST_PORT: u64 = 20_000;
const PORTS: u64 = 12_000;

/// Expands a host list like `n[01-04,7],m3` in its order, as `scontrol show hostnames` does. `None`
/// if the text is not a host list.
pub fn hosts(list: &str) -> Option<Vec<String>> {
    let mut all = Vec::new();
    for entry in entries(list)? {
        all.extend(expand(entry)?);
        if all.len() > MOST_HOSTS {
            return None;
        }
    }
    Some(all)
}

/// Splits a list at the commas outside brackets.
fn entries(list: &str) -> Option<Vec<&str>> {
    let (mut entries, mut start, mut is_inside) = (Vec::new(), 0, false);
    for (index, character) in list.char_indices() {
        match (character, is_inside) {
            ('[', false) => is_inside = true,
            (']', true) => is_inside = false,
            ('[' | ']', _) => return None,
            (',', false) => {
                entries.push(&list[start..index]);
                start = index + 1;
            }
            _ => (),
        }
    }
    entries.push(&list[start..]);
    (!is_inside && entries.iter().all(|entry| !entry.is_empty())).then_some(entries)
}

/// Expands one entry to its hosts; with several brackets the last one varies fastest.
fn expand(entry: &str) -> Option<Vec<String>> {
    let Some((before, rest)) = entry.split_once('[') else { return Some(vec![entry.into()]) };
    let (ranges, suffix) = rest.split_once(']')?;
    let (mut numbers, suffix) = (Vec::new(), expand_rest(suffix)?);
    for range in ranges.split(',') {
        numbers.extend(expand_range(range)?);
        if numbers.len().saturating_mul(suffix.len()) > MOST_HOSTS {
            return None;
        }
    }
    Some(
        numbers
            .iter()
            .flat_map(|number| suffix.iter().map(move |suffix| format!("{before}{number}{suffix}")))
            .collect(),
    )
}

fn expand_rest(suffix: &str) -> Option<Vec<String>> {
    if suffix.is_empty() { Some(vec![String::new()]) } else { expand(suffix) }
}

/// Expands `7` or `01-04` to its numbers, zero-padded to the width of the first one.
fn expand_range(range: &str) -> Option<Vec<String>> {
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(first) || !is_number(last) {
        return None;
    }
    let (low, high): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let is_few = high >= low && high - low < MOST_HOSTS as u64;
    is_few.then(|| {
        (low..=high).map(|number| format!("{number:0width$}", width = first.len())).collect()
    })
}

/// Returns the port at which rank 0 of a job step listens, from 20000 to 31999: the same for all
/// ranks of a step, and most likely another one for another step.
pub fn port(job: u64, step: u64) -> u16 {
    let mixed = job.wrapping_mul(31).wrapping_add(step);
    (FIRST_PORT + mixed % PORTS) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_expand_as_slurm_expands_them() {
        let cases: [(&str, &[&str]); 7] = [
            ("m3", &["m3"]),
            ("n[01-04,7],m3", &["n01", "n02", "n03", "n04", "n7", "m3"]),
            ("n[9-11]", &["n9", "n10", "n11"]),
            ("n[098-101]-ib", &["n098-ib", "n099-ib", "n100-ib", "n101-ib"]),
            ("r[1-2]n[1-2]", &["r1n1", "r1n2", "r2n1", "r2n2"]),
            ("gpu-a.example.org,gpu-b.example.org", &["gpu-a.example.org", "gpu-b.example.org"]),
            ("n[5]", &["n5"]),
        ];
        for (list, expected) in cases {
            assert_eq!(hosts(list).unwrap(), expected, "{list}");
        }
    }

    #[test]
    fn what_is_no_list_of_hosts_is_refused_quickly() {
        let broken = [
            "",
            "n[1-2",
            "n1]",
            "n[[1]]",
            "n[]",
            "n[a-b]",
            "n[2-1]",
            "n[1-]",
            "a,,b",
            "n[0-99999999999]",
            "n[+1-2]",
        ];
        assert!(broken.iter().all(|list| hosts(list).is_none()), "{broken:?}");
        assert_eq!(hosts(&"r[0-999]".repeat(8)), None, "more hosts than there are in the world");
    }

    #[test]
    fn steps_have_ports_of_their_own() {
        assert_eq!(port(0, 0), 20_000);
        assert_eq!(port(4_711, 2), 22_043);
        assert!((0..5_000).all(|job| (20_000..32_000).contains(&port(job, 7))));
        assert_eq!(port(u64::MAX, 0), port(u64::MAX, 0));
        assert_ne!(port(100, 0), port(100, 1));
        assert_ne!(port(100, 0), port(101, 0));
    }
}
