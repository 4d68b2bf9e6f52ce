//! The guest program of `instar convert`.
#![no_std]
#![no_main]

use instar_guest::ops::serve_convert;

instar_guest::program!(serve_convert);
