//! What the older formats have in common: an image without snapshots, further files and tables of its own to tell of.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use instar_blockio::{Codec, Error, FileId, Layer, Result as BlockResult, SectorCipher};
use instar_guest_protocol::message::{Cause, Failure, FileRole, Format, FormatFault, ImageInfo, Key, Reference, Step};
use instar_legacy as legacy;

use super::qcow2::legacy_cipher;
use super::target::{TargetDisk, TargetFile};
use super::{Backing, Compression, ImageWriter, MappedImage, OpenImage, TargetImage};
use crate::ops::failure::{about, block};
use crate::platform::Platform;

/// An opened image and what `info` tells of it.
pub(super) struct Legacy<I> {
    pub image: I,
    pub id: FileId,
    pub format: Format,
    pub facts: Facts,
    /// Hands in the cipher of an encrypted image, until that is done.
    pub unlock: Option<Unlock<I>>,
}

/// Takes the cipher of the contents.
pub(super) type Unlock<I> = fn(&mut I, Arc<dyn SectorCipher>);

/// What `info` tells.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    pub cluster_size: Option<u64>,
    pub encrypted: bool,
    pub backing_file: Option<Vec<u8>>,
    pub backing_format: Option<Vec<u8>>,
}

impl<P: Platform, I: Layer + 'static> OpenImage<P> for Legacy<I> {
    fn format(&self) -> Format {
        self.format
    }

    fn backing(&self) -> Option<Backing> {
        let name = self.facts.backing_file.clone()?;
        Some(Backing { names: alloc::vec![name], driver: self.facts.backing_format.clone() })
    }

    fn unlock(&mut self, platform: &P, key: &Key) -> Result<(), Failure> {
        if let Some(unlock) = self.unlock.take() {
            let cipher = legacy_cipher(self.id, key)?;
            if let Some(state) = platform.files().get(self.id) {
                state.set_cipher(cipher.clone());
            }
            unlock(&mut self.image, cipher);
        }
        Ok(())
    }

    fn open_parts(&mut self, _: &P) -> Result<(), Failure> {
        match self.unlock {
            Some(_) => Err(Failure { format: self.format.into(), ..about(Step::Open, self.id, Cause::Encrypted) }),
            None => Ok(()),
        }
    }

    fn status_unit(&self) -> Option<u64> {
        self.facts.cluster_size.filter(|_| matches!(self.format, Format::Qcow | Format::Vdi))
    }

    fn references(&self) -> Vec<Reference> {
        let reference = |name: &Vec<u8>| Reference { role: FileRole::Backing.into(), name: name.clone() };
        self.facts.backing_file.iter().map(reference).collect()
    }

    fn describe(&self, _: &P, info: &mut ImageInfo) -> Result<(), Failure> {
        info.virtual_size = self.image.size();
        info.cluster_size = self.facts.cluster_size;
        info.encrypted = self.facts.encrypted;
        info.backing_file = self.facts.backing_file.clone();
        info.backing_format = self.facts.backing_format.clone();
        Ok(())
    }

    fn into_layer(self: Box<Self>) -> Box<dyn Layer> {
        Box::new(self.image)
    }
}

/// An image that is written.
pub(super) struct LegacyTarget<P: Platform, F> {
    pub writer: legacy::Writer<TargetDisk<P>, F>,
    pub id: FileId,
    pub block_device: bool,
    pub compression: Option<Compression>,
}

/// How clusters of qcow are compressed.
pub(super) fn deflate(unit: u64) -> Compression {
    Compression { codec: Codec::Deflate, unit, always: false, grain_markers: false }
}

/// The writers of all formats.
pub(super) trait Finish: ImageWriter {
    /// Writes the rest of the metadata.
    fn finish_image(self) -> BlockResult<()>;

    /// See [`MappedImage::expect_backing`].
    fn expect_new_backing(&mut self) {}

    /// Records another backing image; see [`MappedImage::set_backing`].
    fn record_backing(&mut self, id: FileId, name: &[u8], format_name: &[u8]) -> Option<Result<(), Failure>> {
        let _ = (id, name, format_name);
        None
    }
}

impl<P: Platform, F> MappedImage<P> for LegacyTarget<P, F>
where
    legacy::Writer<TargetDisk<P>, F>: Finish,
{
    fn id(&self) -> FileId {
        self.id
    }

    fn disk(&self) -> &dyn ImageWriter {
        &self.writer
    }

    fn disk_mut(&mut self) -> &mut dyn ImageWriter {
        &mut self.writer
    }

    fn compression(&self) -> Option<Compression> {
        self.compression
    }

    fn expect_backing(&mut self) {
        self.writer.expect_new_backing();
    }

    fn set_backing(&mut self, name: &[u8], format_name: &[u8]) -> Option<Result<(), Failure>> {
        self.writer.record_backing(self.id, name, format_name)
    }

    fn on_block_device(&self) -> bool {
        self.block_device
    }

    fn finish(self: Box<Self>) -> Result<(), Failure> {
        let id = self.id;
        self.writer.finish_image().map_err(|error| block(Step::Write, Some(id), error.offset().unwrap_or(0), error))
    }
}

/// Makes or opens the image in a file.
pub(super) fn target<P: Platform, F: Send + 'static>(
    file: TargetFile<P>,
    durable: bool,
    open: impl FnOnce(TargetDisk<P>, FileId) -> Result<(legacy::Writer<TargetDisk<P>, F>, Option<Compression>), Failure>,
) -> Result<TargetImage<P>, Failure>
where
    legacy::Writer<TargetDisk<P>, F>: Finish,
{
    let (id, block_device) = (file.id, file.block_device);
    let (writer, compression) = open(file.disk(durable), id)?;
    Ok(TargetImage::Mapped(Box::new(LegacyTarget { writer, id, block_device, compression })))
}

/// An error of the file below.
pub(super) fn io(step: Step, id: FileId, error: Error) -> Failure {
    block(step, Some(id), error.offset().unwrap_or(0), error)
}

/// The bytes are not those of the format.
pub(super) fn not_in_format(step: Step, id: FileId, format: Format) -> Failure {
    Failure { format: format.into(), ..about(step, id, Cause::NotInFormat) }
}

/// Something wrong with the image, and the value at fault.
pub(super) fn fault(step: Step, id: FileId, format: Format, fault: FormatFault, value: u64) -> Failure {
    Failure { value: fault as u64, value2: value, format: format.into(), ..about(step, id, Cause::FormatFault) }
}

/// A second number for the message.
pub(super) fn with_number(failure: Failure, number: u64) -> Failure {
    Failure { text: alloc::format!("{number}").into_bytes(), ..failure }
}

macro_rules! finish {
    ($($format:ident),*) => {$(
        impl<P: Platform> Finish for legacy::$format::Writer<TargetDisk<P>> {
            fn finish_image(self) -> BlockResult<()> {
                self.finish().map(|_| ())
            }
        }
    )*};
}

finish!(qcow, vdi, parallels);
