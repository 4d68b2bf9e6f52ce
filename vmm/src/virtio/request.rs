//! The shape of a request: header, data, status.

use instar_guest_protocol::limits::MAX_REQUEST_BYTES;
use instar_guest_protocol::ring::{RequestHeader, RequestKind, RequestStatus};
use vm_memory::VolatileSlice;
use zerocopy::FromZeros;
use zerocopy::IntoBytes;

use super::queue::{Chain, Descriptor};
use crate::error::Misbehaviour;
use crate::memory::GuestMemory;
use crate::rawio::Buffers;

/// All kinds, in the order of the statistics.
pub const KINDS: [RequestKind; 10] = [
    RequestKind::Read,
    RequestKind::Write,
    RequestKind::Flush,
    RequestKind::Discard,
    RequestKind::WriteZeroes,
    RequestKind::Holes,
    RequestKind::Copy,
    RequestKind::SetLen,
    RequestKind::Allocate,
    RequestKind::Compare,
];

/// Position of `kind` in [`KINDS`].
pub fn kind_index(kind: RequestKind) -> usize {
    KINDS.iter().position(|k| *k == kind).unwrap_or(0)
}

/// Which way the data descriptors point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// No data.
    None,
    /// From the guest.
    Out,
    /// To the guest.
    In,
}

/// A request with a copy of its header, made once.
pub struct Request<'m> {
    /// The header. Not judged yet.
    pub header: RequestHeader,
    /// Payload.
    pub data: Buffers<'m>,
    /// Bytes of `data`, within [`MAX_REQUEST_BYTES`].
    pub data_len: u64,
    /// Which way the payload goes.
    pub direction: Direction,
    /// Where the status goes.
    pub status: VolatileSlice<'m>,
}

impl<'m> Request<'m> {
    /// Finds the parts of a chain. Neighbouring data descriptors become one buffer.
    pub fn parse(chain: &Chain, memory: &'m GuestMemory) -> Result<Self, Misbehaviour> {
        let shape = Misbehaviour::RequestShape;
        let (first, rest) = chain.split_first().ok_or(shape)?;
        let (last, data) = rest.split_last().ok_or(shape)?;
        if first.write
            || first.len as usize != size_of::<RequestHeader>()
            || !last.write
            || last.len as usize != size_of::<RequestStatus>()
        {
            return Err(shape);
        }
        let direction = match data.first() {
            None => Direction::None,
            Some(Descriptor { write: false, .. }) => Direction::Out,
            Some(Descriptor { write: true, .. }) => Direction::In,
        };
        if data.iter().any(|part| part.write != (direction == Direction::In)) {
            return Err(shape);
        }
        let data_len: u64 = data.iter().map(|part| u64::from(part.len)).sum();
        if data_len > MAX_REQUEST_BYTES {
            return Err(shape);
        }
        let bad = |_| Misbehaviour::DescriptorAddress;
        let mut header = RequestHeader::new_zeroed();
        memory.readable(first.addr, u64::from(first.len)).map_err(bad)?.copy_to(header.as_mut_bytes());
        let status = memory.writable(last.addr, u64::from(last.len)).map_err(bad)?;
        Ok(Self { header, data: joined(data, memory)?, data_len, direction, status })
    }

    /// Bytes that the device may write: data and status.
    pub fn writable_bytes(&self) -> u32 {
        let data = if self.direction == Direction::In { self.data_len } else { 0 };
        // At most MAX_REQUEST_BYTES and a status.
        data as u32 + size_of::<RequestStatus>() as u32
    }
}

fn joined<'m>(data: &[Descriptor], memory: &'m GuestMemory) -> Result<Buffers<'m>, Misbehaviour> {
    let mut buffers = Buffers::default();
    let mut parts = data.iter().peekable();
    while let Some(part) = parts.next() {
        let mut len = u64::from(part.len);
        // Two ranges that the guest may use can touch without being one; such neighbours stay apart.
        let reach = |len| {
            if part.write { memory.writable(part.addr, len) } else { memory.readable(part.addr, len) }
        };
        let mut slice = reach(len).map_err(|_| Misbehaviour::DescriptorAddress)?;
        while let Some(next) = parts.peek().filter(|next| part.addr.checked_add(len) == Some(next.addr)) {
            let Ok(longer) = reach(len + u64::from(next.len)) else { break };
            len += u64::from(next.len);
            slice = longer;
            parts.next();
        }
        buffers.push(slice);
    }
    Ok(buffers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::{HEAP, sample};

    fn part(addr: u64, len: u32, write: bool) -> Descriptor {
        Descriptor { addr: HEAP + addr, len, write }
    }

    #[test]
    fn parts_are_found() {
        let memory = sample();
        let header = RequestHeader { kind: 1, device: 7, offset: 42, len: 300, ..RequestHeader::default() };
        memory.write(HEAP, &header).unwrap();
        let chain = vec![part(0, 48, false), part(4096, 100, false), part(4196, 200, false), part(64, 16, true)];
        let request = Request::parse(&chain, &memory).unwrap();
        assert_eq!(request.header, header);
        assert_eq!((request.data_len, request.direction), (300, Direction::Out));
        assert_eq!(request.writable_bytes(), 16);
    }

    #[test]
    fn other_shapes_are_refused() {
        let memory = sample();
        let (header, status) = (part(0, 48, false), part(64, 16, true));
        let big = part(4096, 16 << 20, true);
        for chain in [
            vec![],
            vec![header],
            vec![header, part(64, 16, false)],
            vec![header, part(64, 15, true)],
            vec![part(0, 47, false), status],
            vec![part(0, 48, true), status],
            vec![header, part(96, 8, true), part(128, 8, false), status],
            vec![header, part(96, 8, false), part(128, 8, true), status],
            vec![header, big, part(64, 1, true), status],
        ] {
            assert_eq!(Request::parse(&chain, &memory).err(), Some(Misbehaviour::RequestShape), "{chain:?}");
        }
        assert!(Request::parse(&vec![header, big, status], &memory).is_ok());
        assert!(Request::parse(&vec![header, part(96, 0, true), status], &memory).is_ok(), "empty parts are legal");
    }

    #[test]
    fn kinds_have_their_places() {
        assert!(KINDS.iter().enumerate().all(|(i, kind)| kind_index(*kind) == i));
    }
}
