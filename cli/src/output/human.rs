//! Output for people: sizes, trees, snapshot tables.

use instar_guest_protocol::message::Snapshot;

use super::node::Node;
use crate::problem::printable;
use crate::version::QemuVersion;

const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

/// A size with three significant digits, in the largest unit in which it stays below 1000.
pub fn size(bytes: u64) -> String {
    let mut unit = 0;
    // The unit changes at 1000, not at 1024: 1000 KiB and 0.977 MiB are told apart by value, not by rounding.
    while unit < UNITS.len() - 1 && u128::from(bytes) >= 1000u128 << (10 * unit) {
        unit += 1;
    }
    format!("{} {}B", three_digits(bytes, 10 * unit as u32), UNITS[unit])
}

/// `%0.3g` of `bytes / 2^shift`, for values below 1024: three significant digits, half to even, no trailing zeroes.
fn three_digits(bytes: u64, shift: u32) -> String {
    let bytes = u128::from(bytes);
    let unit = 1u128 << shift;
    let decimals = match bytes {
        _ if bytes >= 100 * unit => 0,
        _ if bytes >= 10 * unit => 1,
        _ if bytes >= unit => 2,
        _ => 3,
    };
    let scaled = bytes * 10u128.pow(decimals);
    let (mut rounded, rest) = (scaled / unit, scaled % unit);
    if rest * 2 > unit || (rest * 2 == unit && rounded % 2 == 1) {
        rounded += 1;
    }
    let power = 10u128.pow(decimals);
    let (whole, fraction) = (rounded / power, rounded % power);
    match (fraction, decimals) {
        // Rounded up to four digits, which `%g` shows with an exponent.
        _ if whole >= 1000 => "1e+03".to_owned(),
        (0, _) => whole.to_string(),
        (_, decimals) => {
            let digits = format!("{fraction:0width$}", width = decimals as usize);
            format!("{whole}.{}", digits.trim_end_matches('0'))
        }
    }
}

/// The members of a tree, one a line, four blanks for each level.
pub fn tree(members: &[(&'static str, Node)], level: usize) -> String {
    members.iter().map(|(key, value)| entry(&key.replace('-', " "), value, level)).collect()
}

fn entry(key: &str, value: &Node, level: usize) -> String {
    let indent = "    ".repeat(level);
    match value {
        Node::Dict(members) => format!("{indent}{key}:\n{}", tree(members, level + 1)),
        Node::List(items) => {
            let items = items.iter().enumerate();
            let items: String = items.map(|(at, item)| entry(&format!("[{at}]"), item, level + 1)).collect();
            format!("{indent}{key}:\n{items}")
        }
        Node::Bool(on) => format!("{indent}{key}: {on}\n"),
        Node::Int(number) => format!("{indent}{key}: {number}\n"),
        Node::Text(text) => format!("{indent}{key}: {}\n", printable(text.as_bytes())),
    }
}

/// The table of `Snapshot list:` as that version prints it, dates in local time.
pub fn snapshots(snapshots: &[Snapshot], version: QemuVersion, local: &dyn Fn(u32) -> String) -> String {
    let wide = version.has_wide_snapshot_columns();
    let row = |cells: [&str; 6]| {
        let [id, tag, vm_size, date, vm_clock, icount] = cells;
        match wide {
            true => format!("{id:<7} {tag:<16} {vm_size:>8} {date:>19} {vm_clock:>15} {icount:>10}\n"),
            false => format!("{id:<9} {tag:<16} {vm_size:>8}{date:>20}{vm_clock:>13}{icount:>11}\n"),
        }
    };
    let (hours, unknown) = if wide { (4, "--") } else { (2, "") };
    let mut table = match wide {
        true => row(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]),
        false => row(["ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"]),
    };
    for snapshot in snapshots {
        let milliseconds = snapshot.vm_clock_nsec / 1_000_000;
        let seconds = milliseconds / 1000;
        let clock = format!(
            "{:0hours$}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            milliseconds % 1000
        );
        table.push_str(&row([
            &printable(&snapshot.id),
            &printable(&snapshot.name),
            &size(snapshot.vm_state_size),
            &local(snapshot.date_sec),
            &clock,
            &snapshot.icount.map(|count| count.to_string()).unwrap_or_else(|| unknown.to_owned()),
        ]));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (bytes, want) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (1_024_000, "0.977 MiB"),
            (1_023_999, "1e+03 KiB"),
            (65_372, "63.8 KiB"),
            (67_108_864, "64 MiB"),
            (1_507_328, "1.44 MiB"),
            (918_016, "896 KiB"),
            (1_000_000_000, "954 MiB"),
            (1_610_612_736, "1.5 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(size(bytes), want, "{bytes}");
        }
    }

    #[test]
    fn trees() {
        let members = [
            ("compat", Node::text("1.1")),
            (
                "bitmaps",
                Node::List(vec![Node::Dict(vec![
                    ("flags", Node::List(vec![Node::text("auto")])),
                    ("name", Node::bytes(b"b\x1b0")),
                ])]),
            ),
            ("refcount-bits", Node::Int(16)),
        ];
        assert_eq!(
            tree(&members, 1),
            "    compat: 1.1\n    bitmaps:\n        [0]:\n            flags:\n                [0]: auto\n            \
             name: b\\x1b0\n    refcount bits: 16\n"
        );
    }

    #[test]
    fn snapshot_table() {
        let snapshot = Snapshot {
            id: b"2".to_vec(),
            name: b"second one with a longer name".to_vec(),
            vm_state_size: 1_610_612_736,
            vm_clock_nsec: 3_723_004_000_000,
            icount: Some(0),
            ..Snapshot::default()
        };
        assert_eq!(
            snapshots(std::slice::from_ref(&snapshot), QemuVersion::default(), &|_| "2021-03-05 05:06:06".to_owned()),
            "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT\n2       second one with a \
             longer name  1.5 GiB 2021-03-05 05:06:06  0001:02:03.004          0\n"
        );
        let old = QemuVersion::parse("8.2").unwrap();
        let plain = Snapshot { name: b"one".to_vec(), icount: None, ..snapshot };
        assert_eq!(
            snapshots(&[plain], old, &|_| "2021-03-05 05:06:06".to_owned()),
            "ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT\n2         one               1.5 GiB \
             2021-03-05 05:06:06 01:02:03.004           \n"
        );
    }
}
