"""Proteins, and the texts of every format that holds them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from xml.sax.saxutils import escape


@dataclass(frozen=True)
class Protein:
    """An entry, from which the texts of all formats are made."""

    accession: str
    entry: str
    name: str
    organism: str
    taxid: int
    sequence: str
    reviewed: bool = True
    common: str = ""
    gene: str = ""
    existence: int = 1
    version: int = 1
    fragment: bool = False


EXISTENCE = (
    "evidence at protein level",
    "evidence at transcript level",
    "inferred from homology",
    "predicted",
    "uncertain",
)


def make_proteins(count: int = 23) -> list[Protein]:
    rng = random.Random(5)
    organisms = [
        ("Homo sapiens", "Human", 9606),
        ("Escherichia coli (strain K12)", "", 83333),
        ("Human immunodeficiency virus type 1 group M subtype B (isolate HXB2)", "HIV-1", 11706),
        ("Saccharomyces cerevisiae (strain ATCC 204508 / S288c)", "Baker's yeast", 559292),
    ]
    proteins = []
    for i in range(count):
        organism, common, taxid = organisms[i % len(organisms)]
        proteins.append(
            Protein(
                f"Q{i:05d}",
                f"P{i}_HUMAN",
                f"Protein A<B> & {i}, EC=1.1, with a long enough name, beta(1->{i})-linked, for more lines than one",
                organism,
                taxid,
                "".join(rng.choices("ACDEFGHIKLMNPQRSTVWYUX", k=rng.randint(1, 200))),
                reviewed=i % 3 > 0,
                common=common,
                gene=f"gen{i}=x" if i % 4 else "",
                existence=1 + i % 5,
                version=1 + i % 7,
                fragment=i % 5 == 0,
            )
        )
    return proteins


def fasta(proteins: list[Protein]) -> str:
    text = ""
    for p in proteins:
        fragment, gene = " (Fragment)" * p.fragment, f" GN={p.gene}" * bool(p.gene)
        text += f">{'sp' if p.reviewed else 'tr'}|{p.accession}|{p.entry} {p.name}{fragment} OS={p.organism}"
        text += f" OX={p.taxid}{gene} PE={p.existence} SV={p.version}\n{p.sequence}\n"
    return text


def flat(proteins: list[Protein]) -> str:
    text = ""
    for p in proteins:
        first, second = p.name[: p.name.index("with")].strip(), p.name[p.name.index("with") :]
        lines = [
            f"ID   {p.entry:<24}{'Reviewed' if p.reviewed else 'Unreviewed'};{len(p.sequence):>12} AA.",
            f"AC   {p.accession}; Q99999;",
            "AC   Q99998;",
            "DT   21-JUL-1986, integrated into UniProtKB/Swiss-Prot.",
            f"DT   21-JUL-1986, sequence version {p.version}.",
            "DT   24-JAN-2024, entry version 275.",
            f"DE   {'RecName' if p.reviewed else 'SubName'}: Full={first}",
            f"DE            {second} {{ECO:0000255|HAMAP-Rule:MF_00001,",
            "DE            ECO:0000303|PubMed:1234}};".replace("}}", "}"),
            "DE            EC=1.2.3.4;",
            "DE   Contains:",
            "DE     RecName: Full=Not this one;",
        ]
        lines += ["DE   Flags: Precursor; Fragment;"] if p.fragment else []
        lines += [f"GN   Name={p.gene} {{ECO:0000312|EMBL:A1}}; Synonyms=a, b;", "GN   ORFNames=c;"] if p.gene else []
        lines += [f"OS   {p.organism}" + f" ({p.common})." * bool(p.common) + "." * (not p.common)]
        lines += ["OC   Eukaryota; Metazoa.", f"OX   NCBI_TaxID={p.taxid} {{ECO:0000313|EMBL:AEX14553.1}};"]
        lines += ["OH   NCBI_TaxID=9913; Bos taurus (Bovine).", "RN   [1]", "RP   NUCLEOTIDE SEQUENCE.", "RL   x."]
        lines += ["CC   -!- FUNCTION: does ID   and // things.", "CC   ----", "DR   EMBL; A; B; -; mRNA."]
        lines += [f"PE   {p.existence}: {EXISTENCE[p.existence - 1].capitalize()};", "KW   Disease.", "FT   CHAIN 1..2"]
        lines += [f"SQ   SEQUENCE   {len(p.sequence)} AA;  11981 MW;  C2C3B23B85E520E5 CRC64;"]
        for i in range(0, len(p.sequence), 60):
            row = p.sequence[i : i + 60]
            lines.append("     " + " ".join(row[j : j + 10] for j in range(0, len(row), 10)))
        text += "\n".join([*lines, "//"]) + "\n"
    return text


def xml(proteins: list[Protein]) -> str:
    text = '<?xml version="1.0" encoding="UTF-8"?>\n<uniprot xmlns="http://uniprot.org/uniprot"\n xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">\n'
    for p in proteins:
        gene = f'<gene>\n<name type="synonym">s</name><name type="primary">{escape(p.gene)}</name></gene>' * bool(
            p.gene
        )
        common = f'<name type="common">{escape(p.common)}</name>' * bool(p.common)
        fragment = ' fragment="single"' * p.fragment
        kind = "recommendedName" if p.reviewed else "submittedName"
        text += f"""<entry dataset="{"Swiss-Prot" if p.reviewed else "TrEMBL"}" created="1986-07-21"
 modified="2024-01-24" version="275">
<accession>{p.accession}</accession><accession>Q99999</accession>
<name>{p.entry}</name>
<protein><{kind}><fullName evidence="1">{escape(p.name)}</fullName><ecNumber>1.2.3.4</ecNumber></{kind}>
<component><recommendedName><fullName>Not this one</fullName></recommendedName></component></protein>
{gene}
<organism><name type="scientific">{escape(p.organism)}</name>{common}
<dbReference type="NCBI Taxonomy" id="{p.taxid}"/><lineage><taxon>Eukaryota</taxon></lineage></organism>
<organismHost><name type="scientific">Bos taurus</name><dbReference type="NCBI Taxonomy" id="9913"/></organismHost>
<comment type="alternative products"><isoform><id>x</id><sequence type="displayed"/></isoform></comment>
<proteinExistence type="{EXISTENCE[p.existence - 1]}"/>
<sequence length="{len(p.sequence)}" mass="1"{fragment} version="{p.version}">{p.sequence}</sequence>
</entry>
"""
    return text + "<copyright>Copyrighted by the UniProt Consortium</copyright>\n</uniprot>\n"


def uniref_xml(entries: int = 7) -> str:
    text = (
        '<?xml version="1.0" encoding="ISO-8859-1" ?>\n<UniRef50 xmlns="http://uniprot.org/uniref" version="2021_04">\n'
    )
    for i in range(entries):
        text += f"""<entry id="UniRef50_Q{i}" updated="2024-05-29">
<name>Cluster: protein &lt;{i}&gt;</name>
<property type="member count" value="{i + 1}"/>
<property type="common taxon" value="Taxon x={i}"/>
<property type="common taxon ID" value="{10 + i}"/>
<representativeMember>
<dbReference type="UniProtKB ID" id="Q{i}_HUMAN"><property type="NCBI taxonomy" value="9606"/></dbReference>
<sequence length="{61 + i}" checksum="428270C7C0D6A56C">
{"A" * 60}
{"C" * (i + 1)}
  </sequence>
</representativeMember>
<member><dbReference type="UniParc ID" id="UPI1"/><sequence length="1">W</sequence></member>
</entry>
"""
    return text + "</UniRef50>\n"


PROTEINS = make_proteins()


WRITERS = {"fasta": fasta, "dat": flat, "xml": xml}
