//! VDI.

use std::fs::File;
use std::io::Read;

use instar_guest_protocol::message::{Format, Target, VdiOptions};

use super::{CreatableFormat, Layout, file_preallocation};
use crate::commands::Objects;
use crate::options::{Kind, Options, Spec, spec};
use crate::problem::Problem;

/// VirtualBox.
pub static VDI: CreatableFormat = CreatableFormat { format: Format::Vdi, options: OPTIONS, layout, compresses: false };

const OPTIONS: &[Spec] = &[
    spec("size", Kind::Size, None, "Virtual disk size"),
    spec("static", Kind::Switch, Some("off"), "VDI static (pre-allocated) image"),
];

fn layout(options: &Options, _: &Objects) -> Layout {
    let mut layout = Layout::default();
    file_preallocation(&mut layout, options);
    let uuids = random_uuids().unwrap_or_else(|error| {
        layout.early.get_or_insert(Problem::new(format!("Could not make a UUID: {error}")));
        Vec::new()
    });
    let own = VdiOptions { is_static: options.switch("static").unwrap_or(false), uuids };
    layout.wire = Target { format: Format::Vdi.into(), vdi: Some(own), ..Target::default() };
    layout
}

/// Two UUIDs of random numbers (version 4 of RFC 9562).
fn random_uuids() -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    for uuid in bytes.chunks_exact_mut(16) {
        // The field of the version is stored little-endian.
        uuid[7] = uuid[7] & 0x0f | 0x40;
        uuid[8] = uuid[8] & 0x3f | 0x80;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_differ() {
        let (one, other) = (random_uuids().unwrap(), random_uuids().unwrap());
        assert!(one != other && one[..16] != one[16..]);
        assert_eq!((one[7] >> 4, one[24] >> 6), (4, 2));
    }
}
