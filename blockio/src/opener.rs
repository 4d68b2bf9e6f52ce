use alloc::boxed::Box;

use crate::{FileId, Layer, Result};

/// What an image wants a named file for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileRole {
    /// The backing image (or, in VMDK, VHD and VHDX, the parent).
    Backing,
    /// The file with the image's guest data (qcow2 external data file).
    Data,
    /// A part of the disk named by a descriptor (VMDK).
    Extent,
}

/// A file that an [`Opener`] let in.
pub struct OpenedFile {
    /// Its number, by which extents name it.
    pub file: FileId,
    /// Its bytes.
    pub device: Box<dyn Layer>,
}

/// The only way from an image to another file.
///
/// A format never opens anything: it hands out the names that it holds, and whoever composes a
/// chain may ask an opener for them. The opener decides by its policy.
pub trait Opener {
    /// Opens the file that `referrer` names, `name` being the bytes as the image has them.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::ErrorKind::Refused) where the policy says no, or the reason why opening failed.
    fn open(&mut self, name: &[u8], role: FileRole, referrer: FileId) -> Result<OpenedFile>;
}

impl<O: Opener + ?Sized> Opener for &mut O {
    fn open(&mut self, name: &[u8], role: FileRole, referrer: FileId) -> Result<OpenedFile> {
        (**self).open(name, role, referrer)
    }
}
