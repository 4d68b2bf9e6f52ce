//! Names of formats: those that can be opened, those that are only known, and drivers that are no image formats.

use instar_guest_protocol::message::Format;

/// What a driver name of qemu-img means here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// A format that this version opens.
    Provided(Format),
    /// A format that qemu-img opens and this version does not.
    Known(Format),
    /// A protocol or filter of qemu-img.
    Other,
}

/// Looks a driver name up; `None` if qemu-img does not know it either.
pub fn driver(name: &str) -> Option<Driver> {
    if let Some(format) = Format::of_driver(name.as_bytes()) {
        return Some(match format {
            Format::Raw
            | Format::Qcow2
            | Format::Vhdx
            | Format::Vpc
            | Format::Luks
            | Format::File
            | Format::Qcow
            | Format::Qed
            | Format::Vdi
            | Format::Vmdk
            | Format::Parallels
            | Format::Dmg
            | Format::Bochs
            | Format::Cloop => Driver::Provided(format),
            other => Driver::Known(other),
        });
    }
    Some(match name {
        "blkdebug" | "blklogwrites" | "blkverify" | "compress" | "copy-before-write" | "copy-on-read" | "ftp"
        | "ftps" | "gluster" | "host_cdrom" | "http" | "https" | "iscsi" | "iser" | "nbd" | "nfs" | "null-aio"
        | "null-co" | "nvme" | "preallocate" | "quorum" | "rbd" | "replication" | "snapshot-access" | "ssh"
        | "throttle" | "vvfat" => Driver::Other,
        _ => return None,
    })
}

/// The name of a format.
pub fn name(format: Format) -> &'static str {
    match format {
        Format::Unknown => "unknown",
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
        Format::Qcow => "qcow",
        Format::Vmdk => "vmdk",
        Format::Vpc => "vpc",
        Format::Vhdx => "vhdx",
        Format::Vdi => "vdi",
        Format::Qed => "qed",
        Format::Parallels => "parallels",
        Format::Luks => "luks",
        Format::Dmg => "dmg",
        Format::Bochs => "bochs",
        Format::Cloop => "cloop",
        Format::File => "file",
        Format::Iso => "iso",
        Format::Gpt => "gpt",
        Format::Mbr => "mbr",
        Format::Ewf => "ewf",
        Format::Vma => "vma",
        Format::Asif => "asif",
        Format::Bitlocker => "bitlocker",
        Format::Tar => "tar",
        Format::Gzip => "gzip",
        Format::Xz => "xz",
        Format::Zstd => "zstd",
        Format::Bzip2 => "bzip2",
        Format::Zip => "zip",
        Format::Squashfs => "squashfs",
        Format::Wim => "wim",
    }
}

/// Can qemu-img create images of the format?
pub fn can_be_created(format: Format) -> bool {
    !matches!(format, Format::Dmg | Format::Bochs | Format::Cloop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back() {
        for format in 0..=14 {
            let format = Format::try_from(format).unwrap();
            match driver(name(format)) {
                Some(Driver::Provided(found) | Driver::Known(found)) => assert_eq!(found, format),
                other => assert_eq!((format, other), (Format::Unknown, None)),
            }
        }
    }
}
