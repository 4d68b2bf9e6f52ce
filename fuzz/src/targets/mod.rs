//! The targets, one file each.

use crate::Target;

pub mod codec;
pub mod detect;
pub mod legacy;
pub mod luks;
pub mod message;
pub mod monitor;
pub mod partition;
pub mod qcow2_edit;
pub mod qcow2_read;
pub mod qcow2_write;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

/// All targets.
pub const ALL: [Target; 21] = [
    Target { name: "codec", run: codec::run, seeds: codec::seeds },
    Target { name: "detect", run: detect::run, seeds: detect::seeds },
    Target { name: "luks1", run: luks::luks1, seeds: luks::luks1_seeds },
    Target { name: "luks2", run: luks::luks2, seeds: luks::luks2_seeds },
    Target { name: "mailbox", run: monitor::mailbox, seeds: monitor::mailbox_seeds },
    Target { name: "message", run: message::run, seeds: message::seeds },
    Target { name: "partition", run: partition::run, seeds: partition::seeds },
    Target { name: "ring", run: monitor::ring, seeds: monitor::ring_seeds },
    Target { name: "qcow2_edit", run: qcow2_edit::run, seeds: qcow2_edit::seeds },
    Target { name: "qcow2_read", run: qcow2_read::run, seeds: qcow2_read::seeds },
    Target { name: "qcow2_write", run: qcow2_write::run, seeds: qcow2_write::seeds },
    Target { name: "bochs", run: legacy::bochs, seeds: legacy::bochs_seeds },
    Target { name: "cloop", run: legacy::cloop, seeds: legacy::cloop_seeds },
    Target { name: "dmg", run: legacy::dmg, seeds: legacy::dmg_seeds },
    Target { name: "parallels", run: legacy::parallels, seeds: legacy::parallels_seeds },
    Target { name: "qcow", run: legacy::qcow, seeds: legacy::qcow_seeds },
    Target { name: "qed", run: legacy::qed, seeds: legacy::qed_seeds },
    Target { name: "vdi", run: legacy::vdi, seeds: legacy::vdi_seeds },
    Target { name: "vhd", run: vhd::run, seeds: vhd::seeds },
    Target { name: "vhdx", run: vhdx::run, seeds: vhdx::seeds },
    Target { name: "vmdk", run: vmdk::run, seeds: vmdk::seeds },
];
