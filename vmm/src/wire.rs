//! Frames between the caller's process and the monitor process, over a socket pair.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Start of every frame.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// [`Kind`].
    pub kind: u32,
    /// Bytes that follow.
    pub len: u32,
    /// See [`Kind`].
    pub value: u64,
    /// See [`Kind`].
    pub flags: u32,
    /// See [`Kind`].
    pub transmission: u16,
    /// See [`Kind`].
    pub min_block: u16,
    /// See [`Kind`].
    pub base: u64,
    /// See [`Kind`].
    pub fixed: u64,
    /// See [`Kind`].
    pub allocated: u64,
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// To the monitor: a file, as ancillary data. `base` and `value`: where the part that the guest gets begins and ends, in
    /// bytes of the file; `fixed`: not 0 if the end stays; `allocated`: disk space that the file takes; `flags`: device flags. An NBD export: its socket; `value`: its
    /// length; `transmission` and `min_block` as in [`NbdExport`](crate::NbdExport), `min_block` not 0.
    Grant = 1,
    /// To the monitor: the request. The guest starts.
    Start = 2,
    /// To the monitor: the answer to a message.
    Answer = 3,
    /// To the caller: a message of the guest. `value`: room for an answer, 0 if none is expected.
    Message = 4,
    /// To the caller: the guest is done; [`Stats`](crate::Stats) follow.
    Exited = 5,
    /// To the caller: the run failed; a [`Failure`] and the guest's log follow.
    Failed = 6,
    /// To the monitor: how requests on the file that was granted last are to fail; [`RawRule`](crate::faults::RawRule)s follow.
    Faults = 7,
}

impl Header {
    /// A header without value.
    pub fn new(kind: Kind, len: usize) -> Self {
        // Every sender keeps a limit far below 4 GiB.
        Self { kind: kind as u32, len: len as u32, ..Self::default() }
    }

    /// Its kind.
    pub fn kind(&self) -> Option<Kind> {
        [Kind::Grant, Kind::Start, Kind::Answer, Kind::Message, Kind::Exited, Kind::Failed, Kind::Faults]
            .into_iter()
            .find(|kind| *kind as u32 == self.kind)
    }
}

/// Why a run failed, as the monitor tells it: the reason, and the registers of the vCPU concerned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Failure {
    /// The reason.
    pub reason: Reason,
    /// Instruction pointer.
    pub rip: u64,
    /// Last page fault.
    pub cr2: u64,
    /// Flags.
    pub rflags: u64,
    /// General registers.
    pub general: [u64; 16],
}

/// A reason to end a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Reason {
    /// [`Cause`].
    pub cause: u32,
    /// The vCPU concerned.
    pub vcpu: u32,
    /// See [`Cause`].
    pub code: u32,
    /// See [`Cause`].
    pub errno: i32,
}

impl Reason {
    /// A reason without further facts.
    pub fn new(cause: Cause) -> Self {
        Self { cause: cause as u32, ..Self::default() }
    }
}

impl From<Reason> for Failure {
    fn from(reason: Reason) -> Self {
        Self { reason, ..Self::default() }
    }
}

/// Causes of a [`Reason`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Cause {
    /// `code`: a [`KvmStep`](crate::KvmStep); `errno`.
    Kvm = 1,
    /// The registers say where.
    Crashed = 2,
    /// The log has the message.
    Panicked = 3,
    /// `code`: a [`Misbehaviour`](crate::Misbehaviour).
    Misbehaved = 4,
    /// `code`: the guest's exit code.
    ExitCode = 5,
}

/// One end of the socket pair.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// An end.
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// The socket, to wait on.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Sends a frame, with a file if it is a grant.
    pub fn send(&self, header: &Header, body: &[u8], file: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        let files = file.as_slice();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(files));
        }
        let header = header.as_bytes();
        let mut sent = 0;
        while sent < header.len() + body.len() {
            let parts = if sent < header.len() {
                [IoSlice::new(&header[sent..]), IoSlice::new(body)]
            } else {
                [IoSlice::new(&body[sent - header.len()..]), IoSlice::new(&[])]
            };
            sent += retry_on_intr(|| sendmsg(self.socket(), &parts, &mut ancillary, SendFlags::NOSIGNAL))?;
            // The file went with the first byte.
            ancillary.clear();
        }
        Ok(())
    }

    /// Receives the next header, and the file that comes with it. `before` is called before each wait for bytes.
    pub fn receive<E: From<Errno>>(
        &self,
        mut before: impl FnMut() -> Result<(), E>,
    ) -> Result<(Header, Option<OwnedFd>), E> {
        let mut header = Header::new_zeroed();
        let mut file = None;
        let bytes = header.as_mut_bytes();
        let mut got = 0;
        while got < bytes.len() {
            before()?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut bytes[got..])];
            let count = retry_on_intr(|| {
                recvmsg(self.socket(), &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC).map(|message| message.bytes)
            })?;
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(files) = message {
                    file = files.into_iter().next().or(file);
                }
            }
            if count == 0 {
                return Err(Errno::CONNRESET.into());
            }
            got += count;
        }
        Ok((header, file))
    }

    /// Receives the body of a frame.
    pub fn receive_body<E: From<Errno>>(
        &self,
        body: &mut [u8],
        mut before: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        let mut got = 0;
        while got < body.len() {
            before()?;
            let count = retry_on_intr(|| {
                rustix::net::recv(self.socket(), &mut body[got..], RecvFlags::empty()).map(|(count, _)| count)
            })?;
            if count == 0 {
                return Err(Errno::CONNRESET.into());
            }
            got += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::io::{Seek, Write};

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (Channel, Channel) {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        (Channel::new(a), Channel::new(b))
    }

    fn now() -> Result<(), Errno> {
        Ok(())
    }

    #[test]
    fn frames_arrive_whole_and_in_order() {
        let (a, b) = pair();
        let big: Vec<u8> = (0..1 << 20).map(|i| (i % 251) as u8).collect();
        let sender = std::thread::spawn(move || {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(b"contents").unwrap();
            file.rewind().unwrap();
            a.send(&Header { value: 8, ..Header::new(Kind::Grant, 0) }, &[], Some(file.as_fd())).unwrap();
            a.send(&Header::new(Kind::Message, big.len()), &big, None).unwrap();
            a.send(&Header::new(Kind::Answer, 0), &[], None).unwrap();
            big
        });
        let (header, file) = b.receive(now).unwrap();
        assert_eq!((header.kind(), header.value), (Some(Kind::Grant), 8));
        let mut text = String::new();
        std::fs::File::from(file.unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "contents");
        let (header, file) = b.receive(now).unwrap();
        assert_eq!((header.kind(), header.len, file.is_none()), (Some(Kind::Message), 1 << 20, true));
        let mut body = vec![0; 1 << 20];
        b.receive_body(&mut body, now).unwrap();
        assert_eq!(body, sender.join().unwrap());
        assert_eq!(b.receive(now).unwrap().0.kind(), Some(Kind::Answer));
        assert_eq!(b.receive(now).unwrap_err(), Errno::CONNRESET);
    }

    #[test]
    fn unknown_kinds_are_none() {
        assert_eq!(Header { kind: 99, ..Header::default() }.kind(), None);
    }
}
