//! NBD exports that the operator names: addresses and the handshake, by the NBD protocol, "Fixed newstyle negotiation".
//!
//! Only the operator can name one; a name in an image never does. What follows the handshake is the monitor's business.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use instar_vmm::NbdExport;

use crate::problem::{Problem, os_text};

/// Where a server listens, and which of its exports is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    server: Server,
    /// Name of the export; empty: the default one.
    export: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Server {
    Unix(String),
    Tcp { host: String, port: u16 },
}

/// The port of NBD.
const PORT: u16 = 10809;
/// A server that does not answer for so long is given up.
const PATIENCE: Duration = Duration::from_secs(120);

impl Address {
    /// The address behind a file name: `nbd:HOST:PORT[:exportname=E]`, `nbd:unix:PATH[:exportname=E]`, `nbd://HOST[:PORT][/E]`,
    /// `nbd+tcp://…` or `nbd+unix://[/E]?socket=PATH`. `None` if it is no NBD address.
    ///
    /// # Errors
    /// The message, without the name around it.
    pub fn parse(name: &str) -> Result<Option<Self>, Problem> {
        if let Some(rest) = name.strip_prefix("nbd+unix://") {
            return Self::of_unix_uri(rest).map(Some);
        }
        if let Some(rest) = name.strip_prefix("nbd://").or_else(|| name.strip_prefix("nbd+tcp://")) {
            return Self::of_tcp_uri(rest).map(Some);
        }
        match name.strip_prefix("nbd:") {
            Some(rest) => Self::of_colons(rest).map(Some),
            None => Ok(None),
        }
    }

    /// The address in the options of an image, without their prefix. `None` for an option that NBD does not have.
    ///
    /// # Errors
    /// The message, without the image's name around it.
    pub fn of_options(options: &[(String, String)]) -> Result<Self, Problem> {
        let find = |names: &[&str]| {
            options.iter().find(|(key, _)| names.contains(&key.as_str())).map(|(_, value)| value.clone())
        };
        let known = ["path", "host", "port", "export", "server.type", "server.path", "server.host", "server.port"];
        if let Some((key, _)) = options.iter().find(|(key, _)| !known.contains(&key.as_str())) {
            return Err(Problem::new(format!("Block protocol 'nbd' doesn't support the option '{key}'")));
        }
        let server = match (find(&["path", "server.path"]), find(&["host", "server.host"])) {
            (Some(_), Some(_)) => return Err(Problem::new("path and host may not be used at the same time")),
            (Some(path), None) => Server::Unix(path),
            (None, Some(host)) => {
                Server::Tcp { host, port: find(&["port", "server.port"]).map_or(Ok(PORT), |port| parse_port(&port))? }
            }
            (None, None) => return Err(Problem::new("NBD server address missing")),
        };
        Ok(Self { server, export: find(&["export"]).unwrap_or_default() })
    }

    fn of_colons(rest: &str) -> Result<Self, Problem> {
        let (server, export) = match rest.split_once(":exportname=") {
            Some((server, export)) => (server, export.to_owned()),
            None => (rest, String::new()),
        };
        let server = match server.strip_prefix("unix:") {
            Some(path) => Server::Unix(path.to_owned()),
            None => tcp(server).ok_or_else(|| Problem::new(format!("error parsing address '{server}'")))?,
        };
        Ok(Self { server, export })
    }

    fn of_unix_uri(rest: &str) -> Result<Self, Problem> {
        let invalid = || Problem::new("No valid URL specified");
        let (path, query) = rest.split_once('?').ok_or_else(invalid)?;
        let socket = query.split('&').find_map(|pair| pair.strip_prefix("socket=")).ok_or_else(invalid)?;
        let server = Server::Unix(decode(socket).ok_or_else(invalid)?);
        Ok(Self { server, export: decode(path.trim_start_matches('/')).ok_or_else(invalid)? })
    }

    fn of_tcp_uri(rest: &str) -> Result<Self, Problem> {
        let invalid = || Problem::new("No valid URL specified");
        let (server, export) = rest.split_once('/').unwrap_or((rest, ""));
        let default = format!("{server}:{PORT}");
        let has_port = server.rfind(':').is_some_and(|colon| !server[colon..].contains(']'));
        let server = tcp(if has_port { server } else { &default }).ok_or_else(invalid)?;
        Ok(Self { server, export: decode(export).ok_or_else(invalid)? })
    }

    /// The name under which QEMU shows it.
    pub fn shown(&self) -> String {
        let export = |slash: &str| match self.export.is_empty() {
            true => String::new(),
            false => format!("{slash}{}", self.export),
        };
        match &self.server {
            Server::Unix(path) => format!("nbd+unix://{}?socket={path}", export("/")),
            Server::Tcp { host, port } => format!("nbd://{host}:{port}{}", export("/")),
        }
    }

    /// Connects and negotiates.
    ///
    /// # Errors
    /// No connection, no such export, or a server that speaks something else.
    pub fn connect(&self) -> Result<(OwnedFd, NbdExport), Problem> {
        let failed = |server: String| {
            move |error: io::Error| Problem::new(format!("Failed to connect to '{server}': {}", reason(&error)))
        };
        match &self.server {
            Server::Unix(path) => {
                let mut stream = UnixStream::connect(path).map_err(failed(path.clone()))?;
                stream.set_read_timeout(Some(PATIENCE)).map_err(failed(path.clone()))?;
                stream.set_write_timeout(Some(PATIENCE)).map_err(failed(path.clone()))?;
                let export = self.negotiate(&mut stream)?;
                Ok((stream.into(), export))
            }
            Server::Tcp { host, port } => {
                let server = format!("{host}:{port}");
                let mut stream =
                    TcpStream::connect((host.trim_matches(['[', ']']), *port)).map_err(failed(server.clone()))?;
                stream.set_nodelay(true).map_err(failed(server.clone()))?;
                stream.set_read_timeout(Some(PATIENCE)).map_err(failed(server.clone()))?;
                stream.set_write_timeout(Some(PATIENCE)).map_err(failed(server))?;
                let export = self.negotiate(&mut stream)?;
                Ok((stream.into(), export))
            }
        }
    }

    fn negotiate(&self, stream: &mut (impl Read + Write)) -> Result<NbdExport, Problem> {
        match Negotiation(stream).run(&self.export) {
            Ok(Ok(export)) => Ok(export),
            Ok(Err(problem)) => Err(problem),
            Err(error) => Err(Problem::new(format!("Failed to read option reply: {}", reason(&error)))),
        }
    }
}

fn reason(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), os_text)
}

/// `HOST:PORT`, the host perhaps in brackets.
fn tcp(text: &str) -> Option<Server> {
    let (host, port) = text.rsplit_once(':')?;
    let port = parse_port(port).ok()?;
    (!host.is_empty()).then(|| Server::Tcp { host: host.to_owned(), port })
}

fn parse_port(text: &str) -> Result<u16, Problem> {
    text.parse().map_err(|_| Problem::new(format!("error parsing port number '{text}'")))
}

/// Percent encoding.
fn decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                out.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
            }
            byte => out.push(byte),
        }
    }
    String::from_utf8(out).ok()
}

const MAGIC: &[u8; 8] = b"NBDMAGIC";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Handshake flags: fixed newstyle, no padding of zeroes.
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;
/// Options.
const EXPORT_NAME: u32 = 1;
const GO: u32 = 7;
/// Replies and their contents.
const ACK: u32 = 1;
const INFO: u32 = 3;
const ERROR: u32 = 1 << 31;
const UNSUPPORTED: u32 = ERROR | 1;
const UNKNOWN: u32 = ERROR | 6;
const TLS_REQUIRED: u32 = ERROR | 5;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;
/// Replies before the last, and bytes of one, that make sense.
const MAX_REPLIES: usize = 64;
const MAX_REPLY: u32 = 64 << 10;
/// Larger blocks make no sense for images.
const MAX_BLOCK: u32 = 4096;

struct Negotiation<'s, S>(&'s mut S);

impl<S: Read + Write> Negotiation<'_, S> {
    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn run(&mut self, export: &str) -> io::Result<Result<NbdExport, Problem>> {
        if &self.bytes::<8>()? != MAGIC {
            return Ok(Err(Problem::new("Bad initial magic received: the server speaks no NBD")));
        }
        if &self.bytes::<8>()? != OPTION_MAGIC {
            return Ok(Err(Problem::new("The server speaks the oldstyle protocol, which names no exports")));
        }
        let flags = u16::from_be_bytes(self.bytes()?);
        if flags & FIXED_NEWSTYLE == 0 {
            return Ok(Err(Problem::new("Server does not support fixed newstyle negotiation")));
        }
        let ours = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES));
        self.0.write_all(&ours.to_be_bytes())?;
        match self.go(export)? {
            Some(result) => Ok(result),
            None => self.by_name(export, flags & NO_ZEROES == 0),
        }
    }

    fn option(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let len = u32::try_from(data.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.0.write_all(&[OPTION_MAGIC, &option.to_be_bytes()[..], &len.to_be_bytes(), data].concat())
    }

    /// `NBD_OPT_GO`; `None` if the server does not know it.
    fn go(&mut self, export: &str) -> io::Result<Option<Result<NbdExport, Problem>>> {
        let name = export.as_bytes();
        let len = u32::try_from(name.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let data = [&len.to_be_bytes()[..], name, &1u16.to_be_bytes(), &INFO_BLOCK_SIZE.to_be_bytes()].concat();
        self.option(GO, &data)?;
        let mut found = NbdExport { min_block: 1, ..NbdExport::default() };
        let refuse = |text: String| Ok(Some(Err(Problem::new(text))));
        for _ in 0..MAX_REPLIES {
            if u64::from_be_bytes(self.bytes()?) != REPLY_MAGIC || u32::from_be_bytes(self.bytes()?) != GO {
                return refuse("Unexpected option reply of the NBD server".to_owned());
            }
            let kind = u32::from_be_bytes(self.bytes()?);
            let len = u32::from_be_bytes(self.bytes()?);
            if len > MAX_REPLY {
                return refuse("An option reply of the NBD server is too long".to_owned());
            }
            let mut data = vec![0; len as usize];
            self.0.read_exact(&mut data)?;
            match kind {
                ACK => return Ok(Some(check(found))),
                INFO => take_info(&data, &mut found),
                UNSUPPORTED => return Ok(None),
                UNKNOWN => {
                    return refuse(format!(
                        "Requested export not available\nserver reported: export '{export}' not present"
                    ));
                }
                TLS_REQUIRED => return refuse("Server requires TLS, which is not provided".to_owned()),
                kind if kind & ERROR != 0 => {
                    return refuse(format!(
                        "The NBD server refuses the export '{export}' (error {:#x})",
                        kind & !ERROR
                    ));
                }
                _ => {}
            }
        }
        refuse("The NBD server does not come to an end".to_owned())
    }

    /// `NBD_OPT_EXPORT_NAME`, for old servers: it has no reply but the export.
    fn by_name(&mut self, export: &str, padded: bool) -> io::Result<Result<NbdExport, Problem>> {
        self.option(EXPORT_NAME, export.as_bytes())?;
        let len = u64::from_be_bytes(self.bytes()?);
        let flags = u16::from_be_bytes(self.bytes()?);
        if padded {
            self.bytes::<124>()?;
        }
        Ok(check(NbdExport { len, flags, min_block: 1 }))
    }
}

/// Takes `NBD_REP_INFO` over; unknown and short ones say nothing.
fn take_info(data: &[u8], export: &mut NbdExport) {
    let Some((kind, rest)) = data.split_first_chunk() else { return };
    match u16::from_be_bytes(*kind) {
        INFO_EXPORT => {
            if let (Some(len), Some(flags)) = (rest.first_chunk(), rest.get(8..).and_then(<[u8]>::first_chunk)) {
                export.len = u64::from_be_bytes(*len);
                export.flags = u16::from_be_bytes(*flags);
            }
        }
        INFO_BLOCK_SIZE => {
            if let Some(min) = rest.first_chunk() {
                export.min_block = u32::from_be_bytes(*min);
            }
        }
        _ => {}
    }
}

fn check(export: NbdExport) -> Result<NbdExport, Problem> {
    if !export.min_block.is_power_of_two() || export.min_block > MAX_BLOCK {
        return Err(Problem::new(format!("The NBD server asks for blocks of {} bytes", export.min_block)));
    }
    if export.len > i64::MAX as u64 {
        return Err(Problem::new("The NBD export is too large"));
    }
    Ok(export)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn unix(path: &str, export: &str) -> Address {
        Address { server: Server::Unix(path.to_owned()), export: export.to_owned() }
    }

    fn inet(host: &str, port: u16, export: &str) -> Address {
        Address { server: Server::Tcp { host: host.to_owned(), port }, export: export.to_owned() }
    }

    #[test]
    fn addresses() {
        for (name, want) in [
            ("nbd:unix:/a/s.sock", unix("/a/s.sock", "")),
            ("nbd:unix:/a/s.sock:exportname=x:y", unix("/a/s.sock", "x:y")),
            ("nbd+unix:///exp?socket=/a/s.sock", unix("/a/s.sock", "exp")),
            ("nbd+unix://?socket=/a%20b", unix("/a b", "")),
            ("nbd:localhost:77", inet("localhost", 77, "")),
            ("nbd:localhost:77:exportname=e", inet("localhost", 77, "e")),
            ("nbd://h/a%2Fb", inet("h", PORT, "a/b")),
            ("nbd+tcp://[::1]:5/", inet("[::1]", 5, "")),
            ("nbd://[::1]/x", inet("[::1]", PORT, "x")),
        ] {
            assert_eq!(Address::parse(name).unwrap().as_ref(), Some(&want), "{name}");
        }
        assert_eq!(Address::parse("a.raw").unwrap(), None);
        for (name, message) in [
            ("nbd:foo", "error parsing address 'foo'"),
            ("nbd://", "No valid URL specified"),
            ("nbd+unix:///x", "No valid URL specified"),
        ] {
            assert_eq!(Address::parse(name).unwrap_err().to_string(), message);
        }
        let options = |list: &[(&str, &str)]| {
            let list: Vec<_> = list.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            Address::of_options(&list).map_err(|problem| problem.to_string())
        };
        assert_eq!(options(&[("path", "/s"), ("export", "e")]), Ok(unix("/s", "e")));
        assert_eq!(
            options(&[("server.type", "inet"), ("server.host", "h"), ("server.port", "9")]),
            Ok(inet("h", 9, ""))
        );
        assert_eq!(options(&[("export", "e")]), Err("NBD server address missing".to_owned()));
        assert!(options(&[("path", "/s"), ("nonsense", "1")]).is_err());
        assert_eq!(unix("/s", "e").shown(), "nbd+unix:///e?socket=/s");
        assert_eq!(inet("h", 9, "").shown(), "nbd://h:9");
    }

    /// Plays a server's words; what we say goes nowhere.
    struct Script(Cursor<Vec<u8>>);

    impl Read for Script {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.0.read(buf)
        }
    }

    impl Write for Script {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn say(parts: &[&[u8]]) -> Result<NbdExport, String> {
        let hello = [MAGIC, OPTION_MAGIC, &[0, 3][..]].concat();
        let words = [hello, parts.concat()].concat();
        unix("/s", "e").negotiate(&mut Script(Cursor::new(words))).map_err(|problem| problem.to_string())
    }

    fn reply(kind: u32, data: &[u8]) -> Vec<u8> {
        let len = (data.len() as u32).to_be_bytes();
        [&REPLY_MAGIC.to_be_bytes()[..], &GO.to_be_bytes(), &kind.to_be_bytes(), &len, data].concat()
    }

    #[test]
    fn handshakes() {
        let export = reply(INFO, &[&[0, 0][..], &4096u64.to_be_bytes(), &[0, 0x25]].concat());
        let blocks = reply(INFO, &[&[0, 3][..], &512u32.to_be_bytes(), &[0; 8]].concat());
        let found = NbdExport { len: 4096, flags: 0x25, min_block: 512 };
        assert_eq!(say(&[&export, &blocks, &reply(ACK, &[])]), Ok(found));
        let old = [&4096u64.to_be_bytes()[..], &[0, 0x25]].concat();
        assert_eq!(say(&[&reply(UNSUPPORTED, b"no"), &old]), Ok(NbdExport { min_block: 1, ..found }));
        assert!(say(&[&reply(UNKNOWN, &[])]).unwrap_err().starts_with("Requested export not available"));
        assert!(say(&[&reply(ERROR | 2, &[])]).unwrap_err().contains("refuses"));
        let odd = reply(INFO, &[&[0, 3][..], &700u32.to_be_bytes(), &[0; 8]].concat());
        assert!(say(&[&odd, &reply(ACK, &[])]).unwrap_err().contains("700"));
        // What is cut off, too long or without end.
        assert!(say(&[&export[..30]]).is_err());
        let mut long = reply(INFO, &[]);
        long[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(say(&[&long]).unwrap_err().contains("too long"));
        assert!(say(&[&export.repeat(MAX_REPLIES)]).unwrap_err().contains("end"));
        let stranger = unix("/s", "").negotiate(&mut Script(Cursor::new(b"SSH-2.0-OpenSSH".to_vec())));
        assert!(stranger.unwrap_err().to_string().contains("no NBD"));
    }
}
