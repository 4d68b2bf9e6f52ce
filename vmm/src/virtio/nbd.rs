//! A granted NBD export: requests become commands on its socket, by the NBD protocol, "Transmission phase" with simple replies.
//!
//! The caller's process has connected and negotiated. Here one command after the other is sent and its reply awaited; what the
//! server says is believed only as far as it fits the command.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use instar_guest_protocol::ring::RequestKind;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::blk::Fault;
use super::request::Request;

/// What the server offered for an export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NbdExport {
    /// Bytes.
    pub len: u64,
    /// Transmission flags (`NBD_FLAG_*`).
    pub flags: u16,
    /// Smallest unit of a request, a power of two from 1 to 4096.
    pub min_block: u32,
}

/// Transmission flags.
const READ_ONLY: u16 = 1 << 1;
const SEND_FLUSH: u16 = 1 << 2;
const SEND_TRIM: u16 = 1 << 5;
const SEND_WRITE_ZEROES: u16 = 1 << 6;

/// Commands.
const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;
/// Keep the space (`NBD_CMD_FLAG_NO_HOLE`).
const NO_HOLE: u16 = 1 << 1;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const REPLY_BYTES: usize = 16;

/// Bytes of one command: every server takes as much.
const MOST: usize = 1 << 20;
/// Zeroes carry no payload.
const MOST_ZEROES: u64 = 1 << 30;

/// A negotiated connection.
#[derive(Debug)]
pub struct Nbd {
    export: NbdExport,
    socket: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    handle: u64,
    /// The server has broken the protocol or gone: nothing more is sent.
    lost: bool,
    bounce: Vec<u8>,
}

/// A command without its payload.
struct Command {
    flags: u16,
    kind: u16,
    offset: u64,
    len: u32,
}

impl Nbd {
    /// A connection that has left negotiation.
    pub fn new(socket: OwnedFd, export: NbdExport) -> Self {
        Self { export, socket, state: Mutex::default() }
    }

    /// Its socket.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Serves a request whose range has been checked against the rights, but not against the size.
    pub fn serve(&self, kind: RequestKind, request: &mut Request<'_>) -> Result<u64, Fault> {
        let (offset, len) = (request.header.offset, request.header.len);
        let end = offset.checked_add(len).ok_or(Fault::Refused)?;
        let inside = end <= self.export.len;
        match kind {
            RequestKind::Read if inside && len == request.data_len => {
                self.in_pieces(offset, len, |at, piece| {
                    self.read(at, piece)?;
                    request.data.put(piece);
                    Ok(())
                })?;
                Ok(0)
            }
            RequestKind::Write if inside && len == request.data_len => {
                self.in_pieces(offset, len, |at, piece| {
                    request.data.take(piece);
                    self.write(at, piece)
                })?;
                Ok(0)
            }
            RequestKind::Flush => Ok(self.flush().map(|()| 0)?),
            RequestKind::Discard if inside => Ok(self.trim(offset, len).map(|()| 0)?),
            RequestKind::WriteZeroes if inside => Ok(self.write_zeroes(offset, len, false).map(|()| 0)?),
            RequestKind::Allocate if inside => Ok(0),
            _ => Err(Fault::Refused),
        }
    }

    /// Calls `step` for pieces of the range, each with a buffer of its length.
    fn in_pieces(
        &self,
        offset: u64,
        len: u64,
        mut step: impl FnMut(u64, &mut [u8]) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut buffer = vec![0; len.min(MOST as u64) as usize];
        let mut done = 0;
        while done < len {
            let count = (len - done).min(MOST as u64) as usize;
            step(offset + done, &mut buffer[..count])?;
            done += count as u64;
        }
        Ok(())
    }

    /// Reads at any offset.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let mut state = self.lock();
        self.aligned(&mut state, offset, buf.len() as u64, |nbd, state, bounce, skip| {
            let len = bounce.len();
            nbd.in_commands(state, READ, bounce_start(offset, skip), bounce)?;
            debug_assert!(skip + buf.len() <= len);
            buf.copy_from_slice(&bounce[skip..skip + buf.len()]);
            Ok(())
        })
    }

    /// Writes at any offset.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let mut state = self.lock();
        self.aligned(&mut state, offset, bytes.len() as u64, |nbd, state, bounce, skip| {
            let start = bounce_start(offset, skip);
            if bounce.len() != bytes.len() {
                nbd.in_commands(state, READ, start, bounce)?;
            }
            bounce[skip..skip + bytes.len()].copy_from_slice(bytes);
            nbd.in_commands(state, WRITE, start, bounce)
        })
    }

    /// Makes everything written durable.
    fn flush(&self) -> Result<(), Errno> {
        if self.export.flags & SEND_FLUSH == 0 {
            return Ok(());
        }
        self.command(&mut self.lock(), &Command { flags: 0, kind: FLUSH, offset: 0, len: 0 }, &[], &mut [])
    }

    /// Gives space back, where the server can.
    fn trim(&self, offset: u64, len: u64) -> Result<(), Errno> {
        match self.export.flags & SEND_TRIM {
            0 => Ok(()),
            _ => self.without_payload(TRIM, 0, offset, len),
        }
    }

    /// Makes a range read as zero.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), Errno> {
        let block = u64::from(self.export.min_block);
        if self.export.flags & SEND_WRITE_ZEROES != 0 && offset.is_multiple_of(block) && len.is_multiple_of(block) {
            return self.without_payload(WRITE_ZEROES, if unmap { 0 } else { NO_HOLE }, offset, len);
        }
        self.in_pieces(offset, len, |at, piece| self.write(at, piece))
    }

    fn without_payload(&self, kind: u16, flags: u16, offset: u64, len: u64) -> Result<(), Errno> {
        let mut state = self.lock();
        let mut done = 0;
        while done < len {
            let count = (len - done).min(MOST_ZEROES);
            let command = Command { flags, kind, offset: offset + done, len: count as u32 };
            self.command(&mut state, &command, &[], &mut [])?;
            done += count;
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lends a buffer for the whole blocks around a range; `skip`: bytes of it before the range.
    fn aligned<R>(
        &self,
        state: &mut State,
        offset: u64,
        len: u64,
        work: impl FnOnce(&Self, &mut State, &mut [u8], usize) -> Result<R, Errno>,
    ) -> Result<R, Errno> {
        let block = u64::from(self.export.min_block);
        let start = offset - offset % block;
        let end = offset.checked_add(len).ok_or(Errno::INVAL)?;
        let end = end.checked_next_multiple_of(block).ok_or(Errno::INVAL)?;
        let mut bounce = std::mem::take(&mut state.bounce);
        bounce.resize((end - start) as usize, 0);
        let result = work(self, state, &mut bounce, (offset - start) as usize);
        state.bounce = bounce;
        result
    }

    /// Reads into `bytes` or writes them, in commands that every server takes.
    fn in_commands(&self, state: &mut State, kind: u16, offset: u64, bytes: &mut [u8]) -> Result<(), Errno> {
        let mut at = offset;
        for piece in bytes.chunks_mut(MOST) {
            let command = Command { flags: 0, kind, offset: at, len: piece.len() as u32 };
            match kind {
                READ => self.command(state, &command, &[], piece)?,
                _ => self.command(state, &command, piece, &mut [])?,
            }
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Sends a command and takes its reply.
    fn command(&self, state: &mut State, command: &Command, payload: &[u8], answer: &mut [u8]) -> Result<(), Errno> {
        if state.lost {
            return Err(Errno::IO);
        }
        if self.export.flags & READ_ONLY != 0 && command.kind != READ && command.kind != FLUSH {
            return Err(Errno::PERM);
        }
        state.handle += 1;
        let result = self.exchange(state.handle, command, payload, answer);
        match result {
            Ok(0) => Ok(()),
            // Error numbers of the protocol are those of Linux.
            Ok(error) => Err(i32::try_from(error).map_or(Errno::IO, Errno::from_raw_os_error)),
            Err(errno) => {
                state.lost = true;
                Err(if errno == Errno::AGAIN { Errno::TIMEDOUT } else { errno })
            }
        }
    }

    fn exchange(&self, handle: u64, command: &Command, payload: &[u8], answer: &mut [u8]) -> Result<u32, Errno> {
        let mut header = Vec::with_capacity(28);
        header.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header.extend_from_slice(&command.flags.to_be_bytes());
        header.extend_from_slice(&command.kind.to_be_bytes());
        header.extend_from_slice(&handle.to_be_bytes());
        header.extend_from_slice(&command.offset.to_be_bytes());
        header.extend_from_slice(&command.len.to_be_bytes());
        self.send_all(&header)?;
        self.send_all(payload)?;
        let mut reply = [0; REPLY_BYTES];
        self.receive_all(&mut reply)?;
        let word = |at: usize| reply[at..].first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        if word(0) != REPLY_MAGIC || reply[8..] != handle.to_be_bytes() {
            return Err(Errno::IO);
        }
        if word(4) == 0 {
            self.receive_all(answer)?;
        }
        Ok(word(4))
    }

    fn send_all(&self, mut bytes: &[u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            let sent = retry_on_intr(|| send(&self.socket, bytes, SendFlags::NOSIGNAL))?;
            bytes = bytes.get(sent..).ok_or(Errno::IO)?;
        }
        Ok(())
    }

    fn receive_all(&self, buf: &mut [u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < buf.len() {
            match retry_on_intr(|| recv(&self.socket, &mut buf[done..], RecvFlags::empty()))?.0 {
                0 => return Err(Errno::CONNRESET),
                count => done += count,
            }
        }
        Ok(())
    }
}

/// Where the whole blocks begin.
fn bounce_start(offset: u64, skip: usize) -> u64 {
    offset - skip as u64
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A server in memory that takes only whole blocks and, after `serves` commands, says nonsense.
    fn server(len: usize, block: u32, serves: usize) -> (Nbd, std::thread::JoinHandle<Vec<u8>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let flags = SEND_FLUSH | SEND_TRIM | SEND_WRITE_ZEROES;
        let nbd = Nbd::new(ours.into(), NbdExport { len: len as u64, flags, min_block: block });
        let thread = std::thread::spawn(move || {
            let mut disk = vec![0u8; len];
            let mut header = [0; 28];
            for served in 0.. {
                if theirs.read_exact(&mut header).is_err() {
                    break;
                }
                let kind = u16::from_be_bytes(header[6..8].try_into().unwrap());
                let offset = u64::from_be_bytes(header[16..24].try_into().unwrap()) as usize;
                let count = u32::from_be_bytes(header[24..28].try_into().unwrap()) as usize;
                let aligned = offset.is_multiple_of(block as usize) && count.is_multiple_of(block as usize);
                let bad = offset + count > disk.len() || !aligned;
                let mut payload = vec![0; if kind == WRITE { count } else { 0 }];
                theirs.read_exact(&mut payload).unwrap();
                let mut reply = REPLY_MAGIC.to_be_bytes().to_vec();
                reply.extend(if bad { 22u32 } else { 0 }.to_be_bytes());
                reply.extend(&header[8..16]);
                if served >= serves {
                    reply[0] ^= 1;
                }
                match kind {
                    READ if !bad => reply.extend(&disk[offset..offset + count]),
                    WRITE if !bad => disk[offset..offset + count].copy_from_slice(&payload),
                    WRITE_ZEROES | TRIM if !bad => disk[offset..offset + count].fill(0),
                    _ => {}
                }
                theirs.write_all(&reply).unwrap();
            }
            disk
        });
        (nbd, thread)
    }

    #[test]
    fn any_range_over_whole_blocks() {
        let (nbd, thread) = server(3 << 20, 512, usize::MAX);
        let pattern: Vec<u8> = (0..2_200_000u32).map(|i| (i % 251) as u8 + 1).collect();
        nbd.write(777, &pattern).unwrap();
        let mut back = vec![0; pattern.len() + 20];
        nbd.read(767, &mut back).unwrap();
        assert_eq!(back[..10], [0; 10]);
        assert_eq!(back[10..pattern.len() + 10], pattern);
        nbd.write_zeroes(1000, 30, false).unwrap();
        nbd.write_zeroes(1 << 20, 1 << 20, true).unwrap();
        nbd.flush().unwrap();
        drop(nbd);
        let disk = thread.join().unwrap();
        assert_eq!(disk[777..1000], pattern[..223]);
        assert_eq!(disk[1000..1030], [0; 30]);
        assert_eq!(disk[1030..1 << 20], pattern[253..(1 << 20) - 777]);
        assert!(disk[1 << 20..2 << 20].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn errors_of_the_server_and_of_the_protocol() {
        let (nbd, thread) = server(4096, 512, 3);
        assert_eq!(nbd.read(4096, &mut [0; 512]), Err(Errno::INVAL));
        nbd.read(0, &mut [0; 512]).unwrap();
        nbd.write(0, &[1; 512]).unwrap();
        assert_eq!(nbd.read(0, &mut [0; 512]), Err(Errno::IO));
        assert_eq!(nbd.write(0, &[1; 512]), Err(Errno::IO), "nothing is sent after nonsense");
        drop(nbd);
        thread.join().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let read_only = NbdExport { len: 4096, flags: READ_ONLY, min_block: 1 };
        let nbd = Nbd::new(ours.into(), read_only);
        assert_eq!(nbd.write(0, &[1]), Err(Errno::PERM));
        drop(theirs);
        assert!(nbd.read(0, &mut [0]).is_err());
    }
}
